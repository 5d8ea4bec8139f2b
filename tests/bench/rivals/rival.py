"""The servers that install from PyPI: what each needs, how it is started, and what is not compared."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.bench import programs
from tests.bench.dialects import Dialect
from tests.bench.programs import Program
from tests.bench.rivals.dialects import BentoML, BentoMLClips, LitServe, LitServeClips, MLServer, MLServerClips, Triton, TritonClips

HERE = Path(__file__).parent
ENVIRONMENTS = programs.ROOT / "build" / "rivals"
TOGETHER = 64  # most steps in one batch, as our service has it
WAIT_S = 0.0005  # longest wait for a batch, where one must be said
INSTALL_S = 1200.0
PYTHON_VERSION = f"{sys.version_info.major}.{sys.version_info.minor}"

Command = Callable[["Rival", Path, Path], tuple[list[str], str, dict[str, str]]]


@dataclass(frozen=True)
class Rival:
    """`dialect` sends it streams, `clips` whole clips.

    `command` makes, from the model's file and a folder of its own, a command line, the path that answers 200 when it is ready, and an environment.
    """

    name: str
    requirements: tuple[str, ...]
    dialect: type[Dialect]
    clips: type[Dialect]
    command: Command

    @property
    def whole(self) -> str:
        """Who is asked for clips."""
        return f"{self.name} clips"

    @property
    def environment(self) -> Path:
        return ENVIRONMENTS / self.name.lower()

    @property
    def packages(self) -> Path:
        return self.environment / "lib" / f"python{PYTHON_VERSION}" / "site-packages"

    def install(self) -> str:
        """Makes its environment if that is not there; "" or why it cannot be had here."""
        done = self.environment / ".installed"
        if done.exists() and done.read_text() == " ".join(self.requirements):
            return ""
        shutil.rmtree(self.environment, ignore_errors=True)
        pip = [str(self.environment / "bin" / "python"), "-m", "pip", "install", "-q", "--disable-pip-version-check"]
        for command in ([sys.executable, "-m", "venv", str(self.environment)], [*pip, *self.requirements]):
            ended = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_S)
            if ended.returncode:
                return (ended.stderr or ended.stdout).strip().splitlines()[-1]
        done.write_text(" ".join(self.requirements))
        return ""

    @contextmanager
    def run(self, model: Path, folder: Path) -> Iterator[Program]:
        (port,) = programs.free_ports(1)
        own = folder / self.name
        own.mkdir()
        command, ready, environment = self.command(self, model, own)
        line = [part.replace("{port}", str(port)) for part in command]
        environment = {name: value.replace("{port}", str(port)) for name, value in environment.items()}
        base = {"PYTHONPATH": str(HERE), "BENCH_MODEL_FILE": str(model), "PATH": f"{self.environment / 'bin'}:{os.environ['PATH']}"}
        with programs.answering(line, f"http://127.0.0.1:{port}", ready, {**base, **environment}, own / "log") as program:
            yield program


def _litserve(rival: Rival, model: Path, folder: Path) -> tuple[list[str], str, dict[str, str]]:
    return [str(rival.environment / "bin" / "python"), str(HERE / "litserve_server.py"), str(model), "{port}"], "/health", {}


def _mlserver(rival: Rival, model: Path, folder: Path) -> tuple[list[str], str, dict[str, str]]:
    grpc, metrics = programs.free_ports(2)
    settings = {"host": "127.0.0.1", "grpc_port": grpc, "metrics_port": metrics, "parallel_workers": 0, "debug": False}
    batching = {"max_batch_size": TOGETHER, "max_batch_time": WAIT_S}
    (folder / "settings.json").write_text(json.dumps(settings))
    (folder / "model-settings.json").write_text(json.dumps({"name": "bench", "implementation": "mlserver_runtime.Streams", **batching}))
    return [str(rival.environment / "bin" / "mlserver"), "start", str(folder)], "/v2/health/ready", {"MLSERVER_HTTP_PORT": "{port}"}


def _bentoml(rival: Rival, model: Path, folder: Path) -> tuple[list[str], str, dict[str, str]]:
    command = [str(rival.environment / "bin" / "bentoml"), "serve", "bentoml_service:Streams", "--working-dir", str(HERE)]
    return [*command, "--host", "127.0.0.1", "--port", "{port}"], "/readyz", {"BENTOML_HOME": str(folder), "BENTOML_DO_NOT_TRACK": "True"}


TRITON_CONFIG = """
name: "bench"
backend: "python"
max_batch_size: {together}
input [{{ name: "frames" data_type: TYPE_FP32 dims: [-1, {width}] }}]
output [{{ name: "scores" data_type: TYPE_FP32 dims: [-1, {classes}] }}]
instance_group [{{ count: 1 kind: KIND_CPU }}]
parameters {{ key: "model_file" value {{ string_value: "{model}" }} }}
sequence_batching {{
  max_sequence_idle_microseconds: 600000000
  oldest {{ max_candidate_sequences: 4096 max_queue_delay_microseconds: 0 }}
  control_input [
    {{ name: "CORRID" control [{{ kind: CONTROL_SEQUENCE_CORRID data_type: TYPE_UINT64 }}] }},
    {{ name: "START" control [{{ kind: CONTROL_SEQUENCE_START fp32_false_true: [0, 1] }}] }}
  ]
}}
"""


def _triton(rival: Rival, model: Path, folder: Path) -> tuple[list[str], str, dict[str, str]]:
    """Its core with the python backend, as pytriton's wheel has both; the interpreter of the backend is this Python's version."""
    import onnx

    graph = onnx.load(model, load_external_data=False).graph
    width, classes = graph.input[0].type.tensor_type.shape.dim[2].dim_value, graph.output[0].type.tensor_type.shape.dim[2].dim_value
    own = folder / "models" / "bench"
    (own / "1").mkdir(parents=True)
    shutil.copy(HERE / "triton_model.py", own / "1" / "model.py")
    (own / "config.pbtxt").write_text(TRITON_CONFIG.format(together=TOGETHER, width=width, classes=classes, model=model))
    server = rival.packages / "pytriton" / "tritonserver"
    stub = server / "python_backend_stubs" / PYTHON_VERSION / "triton_python_backend_stub"
    shutil.copy(stub, server / "backends" / "python")
    options = {"model-repository": folder / "models", "backend-directory": server / "backends", "http-address": "127.0.0.1", "http-port": "{port}"}
    off = {"allow-grpc": "0", "allow-metrics": "0", "pinned-memory-pool-byte-size": "0"}
    command = [str(server / "bin" / "tritonserver"), *(f"--{name}={value}" for name, value in {**options, **off}.items())]
    libraries = f"{sysconfig.get_config_var('LIBDIR')}:{os.environ.get('LD_LIBRARY_PATH', '')}"
    return command, "/v2/health/ready", {"PYTHONPATH": f"{rival.packages}:{HERE}", "LD_LIBRARY_PATH": libraries}


# Versions as they were when this was written; Triton's backend of that release does not understand numpy 2.
RIVALS = (
    Rival("Triton", ("nvidia-pytriton==0.7.0", "onnxruntime==1.32.0", "numpy==1.26.4"), Triton, TritonClips, _triton),
    Rival("LitServe", ("litserve==0.2.19", "onnxruntime==1.32.0"), LitServe, LitServeClips, _litserve),
    Rival("MLServer", ("mlserver==1.7.1", "onnxruntime==1.32.0"), MLServer, MLServerClips, _mlserver),
    Rival("BentoML", ("bentoml==1.4.39", "onnxruntime==1.32.0"), BentoML, BentoMLClips, _bentoml),
)
