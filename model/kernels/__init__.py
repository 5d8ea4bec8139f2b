"""Implementations of the recurrence, each held against the plain loop in `model.recurrence`."""
