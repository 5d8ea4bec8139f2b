"""`python -m service` serves; its subcommands talk to a service that runs, or measure what suits one."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from service.errors import StartupError

app = typer.Typer(
    add_completion=False,
    no_args_is_help=False,
    pretty_exceptions_enable=False,
    help="Serves IndRNN models from ONNX files. Every option is also a variable, INDRNN_PORT and so on.",
)


@app.callback(invoke_without_command=True)
def serve(
    context: typer.Context,
    host: Annotated[str | None, typer.Option(help="Address to listen on (default 127.0.0.1).")] = None,
    port: Annotated[int | None, typer.Option(help="Port (default 8000); 0 takes a free one.")] = None,
    grpc_port: Annotated[int | None, typer.Option(help="Port of gRPC (default: off); 0 takes a free one.")] = None,
    models: Annotated[
        Path | None, typer.Option(help="Directory of models, <name>/<version>/model.onnx (default ./models where present); shipped models come after it.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="auto, cuda or cpu (default auto).")] = None,
    threads: Annotated[int | None, typer.Option(help="Threads inside one model run.")] = None,
    max_batch: Annotated[int | None, typer.Option(help="Most streams in one model run (default 64).")] = None,
    queue: Annotated[int | None, typer.Option(help="Most messages waiting per model (default 1024).")] = None,
    deadline_s: Annotated[float | None, typer.Option("--deadline-s", help="Seconds a message may wait (default 10).")] = None,
    sessions: Annotated[int | None, typer.Option(help="Most live sessions (default 10000).")] = None,
    idle_s: Annotated[float | None, typer.Option("--idle-s", help="Seconds after which an idle session expires (default 600).")] = None,
    connections: Annotated[int | None, typer.Option(help="Most open websockets (default 2000).")] = None,
    log_level: Annotated[str | None, typer.Option(help="debug, info, warning or error (default info).")] = None,
    log_format: Annotated[str | None, typer.Option(help="auto, console or json (default auto).")] = None,
    workers: Annotated[int | None, typer.Option(help="Processes; only 1 until sessions have a shared store.")] = None,
) -> None:
    """Serves until Ctrl-C."""
    if context.invoked_subcommand is not None:
        return
    given = {name: value for name, value in context.params.items() if value is not None}
    try:
        _serve(given)
    except StartupError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:  # Ctrl-C before the server took the signals over
        sys.exit(130)


@app.command()
def stream(
    file: Annotated[str, typer.Argument(help="Recording (.npy, .npz, .json, .csv), or the name of a shipped sample.")],
    model: Annotated[str, typer.Option(help="Served name of the model.")],
    url: Annotated[str, typer.Option(help="Where the service runs.")] = "http://127.0.0.1:8000",
    fps: Annotated[float | None, typer.Option(min=0.001, help="Frames a second of the recording (default: as its file says, else the model's).")] = None,
    speed: Annotated[float, typer.Option(min=0.001, help="2 plays twice as fast.")] = 1.0,
    chunk: Annotated[int, typer.Option(min=1, help="Frames per message.")] = 1,
    token: Annotated[str | None, typer.Option(envvar="INDRNN_TOKEN", help="Bearer token, where the service asks for one.")] = None,
    layout: Annotated[str | None, typer.Option(help="Joint layout of the recording (default: as its file says, else the model's).")] = None,
    loop: Annotated[bool, typer.Option("--loop", help="Start again at the end, until Ctrl-C.")] = False,
) -> None:
    """Plays a recording into a running service and shows its answers live."""
    from service.player import Options, run

    sys.exit(run(Options(file, model, url, fps, speed, chunk, token, layout, loop)))


@app.command()
def tune(
    model: Annotated[str, typer.Option(help="Name of the model.")],
    version: Annotated[str | None, typer.Option(help="Its version (default: the one that is served by default).")] = None,
    models: Annotated[Path | None, typer.Option(help="Directory of models (default ./models where present); shipped models come after it.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cuda or cpu (default auto).")] = None,
    batches: Annotated[str, typer.Option(help="Numbers of streams in a run, comma separated.")] = "1,2,4,8,16,32,64,128,256",
    rounds: Annotated[int, typer.Option(min=1, help="How often each is measured.")] = 15,
    write: Annotated[Path | None, typer.Option(help="File of variables to put the settings into, such as .env for Docker; what else it holds stays.")] = None,
) -> None:
    """Measures which threads and batches suit a model on this machine; Ctrl-C shows what is known by then."""
    from service.logs import configure_logs
    from service.settings import load_settings

    configure_logs("warning", "auto")
    try:
        sizes = [int(size) for size in batches.split(",")]
        if not all(1 <= size <= 4096 for size in sizes):
            raise ValueError
    except ValueError:
        sys.exit(f"error: --batches: numbers from 1 to 4096 with commas between are needed, got {batches!r}")
    try:
        settings = load_settings(models=models, device=device)

        from service.server import model_directories
        from service.tune import run

        sys.exit(run(model_directories(settings), settings, model, version, batches=sizes, rounds=rounds, to=write))
    except StartupError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


def _serve(given: dict[str, Any]) -> None:
    from service.logs import configure_logs
    from service.settings import load_settings

    settings = load_settings(**given)
    configure_logs(settings.log_level, settings.log_format)

    from service.server import serve as run  # models and the web framework take their time: faults in the settings are told first

    run(settings)


if __name__ == "__main__":
    app(prog_name="python -m service")
