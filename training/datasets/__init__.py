"""One reader per file format: a path in, a `ClipSet` out."""
