"""What is known of the work under way: its request's id, its session, how its batch was. Log lines show it, traces take it along.

Notes belong to a request or a connection, wherever in the code its work is done; code that runs outside of any notes nothing.
To note costs a look at a context variable and an entry in a dict, so nothing is turned into text before a line is written.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any

_current: ContextVar[dict[str, Any] | None] = ContextVar("notes", default=None)


def begin(**facts: Any) -> dict[str, Any]:
    """New notes for this task and for those that it starts."""
    _current.set(facts)
    return facts


def branch(**facts: Any) -> dict[str, Any]:
    """New notes that go on from those under way, without touching them: for one of several that share a connection."""
    return begin(**{**(_current.get() or {}), **facts})


def note(**facts: Any) -> None:
    """Adds to the notes of the work under way; a session may be given as it is, only its digest is ever shown."""
    notes = _current.get()
    if notes is not None:
        notes.update(facts)


def current() -> dict[str, Any] | None:
    """The notes of the work under way themselves, for whoever adds to them from outside of its task; None where there are none."""
    return _current.get()


def spoken(notes: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The notes as they may be shown, those under way unless others are given: whatever has a digest stands as that."""
    shown = _current.get() if notes is None else notes
    return {name: getattr(value, "digest", value) for name, value in (shown or {}).items()}
