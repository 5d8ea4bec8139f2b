"""One reader per file format: a path in, a `ClipSet` or `Recordings` out."""
