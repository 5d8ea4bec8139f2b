"""Logging: one line per event, as JSON for machines or in columns for a terminal, with the ids of the request and session it belongs to."""

from __future__ import annotations

import logging
import sys
from collections.abc import MutableMapping
from typing import Any

import structlog

from service import notes


def configure_logs(level: str, form: str) -> None:
    """Sends structlog's and the standard library's lines to stderr; `form` is auto, console or json."""
    console = form == "console" or (form == "auto" and sys.stderr.isatty())
    shared: list[Any] = [
        _with_notes,
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="%H:%M:%S" if console else "iso", utc=not console),
    ]
    renderer: Any = structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty()) if console else structlog.processors.JSONRenderer()
    tail: list[Any] = [renderer] if console else [structlog.processors.format_exc_info, renderer]
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, level.upper())),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(foreign_pre_chain=shared, processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *tail])
    )
    logging.basicConfig(handlers=[handler], level=level.upper(), force=True)
    logging.getLogger("uvicorn").setLevel(logging.WARNING)  # its start and stop lines say less than ours


def _with_notes(_: Any, __: str, line: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """What is known of the work under way, unless the line says otherwise."""
    for name, value in notes.spoken().items():
        line.setdefault(name, value)
    return line
