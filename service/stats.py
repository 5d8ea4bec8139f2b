"""`GET /v1/stats`: how the service is doing, for people; as JSON, or as text for a terminal."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response

from service.app_state import history_of, predictor_of
from service.engine import resident_bytes
from service.history import History, Period, totals
from service.predictor import Predictor
from service.protocol import encode
from service.runner import Runner

router = APIRouter()

_SHORT_S, _LONG_S = 10.0, 60.0
_COLUMNS = (
    ("model", "name"),
    ("version", "version"),
    ("device", "device"),
    ("sessions", "sessions"),
    ("waiting", "waiting"),
    ("frames/s", "frames_per_s_10s"),
    ("(1 min)", "frames_per_s_1min"),
    ("p50 ms", "latency_p50_ms"),
    ("p99 ms", "latency_p99_ms"),
    ("wait p50", "wait_p50_ms"),
    ("wait p99", "wait_p99_ms"),
    ("batch", "batch_rows"),
    ("padding", "padding"),
)


@router.get(
    "/v1/stats",
    summary="How the service is doing",
    tags=["service"],
    response_model=None,
    responses={200: {"content": {"application/json": {"schema": {"type": "object"}}, "text/plain": {"schema": {"type": "string"}}}}},
)
async def stats(request: Request) -> Response:
    """For people; machines read `/metrics`. Latencies, waits, batches and padding are those of the last minute. `Accept: text/plain` gives a table."""
    value = figures(predictor_of(request), history_of(request))
    if "text/plain" in request.headers.get("accept", ""):
        return Response(as_text(value), media_type="text/plain")
    return Response(encode(value), media_type="application/json")


def figures(predictor: Predictor, history: History) -> dict[str, Any]:
    """Everything that the page tells; figures over a time in which nothing happened are None."""
    metrics, short, long = predictor.metrics, history.last(_SHORT_S), history.last(_LONG_S)
    ended: dict[str, int] = {}
    for (_, _, cause), count in totals(metrics.sessions_ended).items():
        ended[cause] = ended.get(cause, 0) + int(count)
    sockets = sum(sample.value for family in metrics.sockets_live.collect() for sample in family.samples)
    return {
        "uptime_s": round(history.uptime_s, 1),
        "draining": predictor.draining,
        "memory_bytes": resident_bytes(),
        "sockets": int(sockets),
        "requests_per_s_10s": _rounded(short.requests_per_s),
        "requests_per_s_1min": _rounded(long.requests_per_s),
        "sessions": {
            "live": len(predictor.sessions),
            "opened": int(sum(totals(metrics.sessions_opened).values())),
            "refused": int(sum(totals(metrics.sessions_refused).values())),
            "ended": ended,
        },
        "errors": {code: int(count) for (code,), count in totals(metrics.errors).items()},
        "models": [_model(predictor, runner, short, long) for runner in _runners(predictor)],
    }


def as_text(value: dict[str, Any]) -> str:
    """The same as a few lines and a table."""
    sessions = value["sessions"]
    lines = [
        f"up {_duration(value['uptime_s'])}{', draining' if value['draining'] else ''}, memory {value['memory_bytes'] / 2**20:.0f} MiB, "
        f"websockets {value['sockets']}, requests {value['requests_per_s_10s']}/s ({value['requests_per_s_1min']}/s over 1 min)",
        f"sessions: {sessions['live']} live, {sessions['opened']} opened, {sessions['refused']} refused, ended: {_listed(sessions['ended'])}",
        f"errors: {_listed(value['errors'])}",
        "",
    ]
    rows = [[title for title, _ in _COLUMNS], *([_spoken(model[name]) for _, name in _COLUMNS] for model in value["models"])]
    widths = [max(len(row[i]) for row in rows) for i in range(len(_COLUMNS))]
    lines += ["  ".join(text.ljust(width) if i < 3 else text.rjust(width) for i, (text, width) in enumerate(zip(row, widths, strict=True))) for row in rows]
    return "\n".join(line.rstrip() for line in lines) + "\n"


def _model(predictor: Predictor, runner: Runner, short: Period, long: Period) -> dict[str, Any]:
    key = (runner.name, runner.version)
    return {
        "name": runner.name,
        "version": runner.version,
        "device": runner.engine.device.name,
        "provider": runner.engine.device.provider,
        **predictor.models.figures(runner),
        "sessions": runner.rows.taken,
        "waiting": runner.live_figures()["waiting"],
        "frames": int(totals(predictor.metrics.frames).get(key, 0)),
        "frames_per_s_10s": _rounded(short.frames_per_s(key)),
        "frames_per_s_1min": _rounded(long.frames_per_s(key)),
        "messages_per_s_1min": _rounded(long.messages_per_s(key)),
        "latency_p50_ms": _ms(long.latency_s(key, 0.5)),
        "latency_p99_ms": _ms(long.latency_s(key, 0.99)),
        "wait_p50_ms": _ms(long.wait_s(key, 0.5)),
        "wait_p99_ms": _ms(long.wait_s(key, 0.99)),
        "batch_rows": _rounded(long.batch_rows(key)),
        "padding": _rounded(long.padding(key)),
    }


def _runners(predictor: Predictor) -> list[Runner]:
    """Versions in service, by name; those that only finish their sessions are in the metrics."""
    return [predictor.runner(entry.name, entry.version) for entry in predictor.catalog]


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(1000 * seconds, 3)


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 2)


def _spoken(value: Any) -> str:
    return "-" if value is None else str(value)


def _listed(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(counts.items())) or "none"


def _duration(seconds: float) -> str:
    minutes, hours, days = int(seconds // 60), int(seconds // 3600), int(seconds // 86400)
    if days:
        return f"{days} d {hours % 24} h"
    if hours:
        return f"{hours} h {minutes % 60} min"
    return f"{minutes} min {int(seconds % 60)} s" if minutes else f"{seconds:.0f} s"
