# Training and export. From the root of the repository:
#   docker build -f docker/train.Dockerfile -t indrnn-train .
#   docker build -f docker/train.Dockerfile -t indrnn-train:gpu --build-arg TORCH_PIP_ARGS= .
ARG BASE=python:3.11-slim-bookworm

FROM ${BASE} AS packages
# where pip finds torch: PyTorch's own index has the CPU build, PyPI (no arguments) the CUDA build with gigabytes of libraries
ARG TORCH_PIP_ARGS="--index-url https://download.pytorch.org/whl/cpu"
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ARG PIP_TRUSTED_HOST
# triton (700 MB) comes with torch's CUDA build; beside the CPU build it is for tests only
COPY requirements-train.txt requirements-torch.txt /
RUN --mount=type=cache,target=/root/.cache/pip \
    python3 -m venv --without-pip /opt/venv \
    && pip="python3 -m pip --python /opt/venv/bin/python install --disable-pip-version-check --no-warn-script-location" \
    && grep -v "^triton==" /requirements-train.txt >/requirements.txt \
    && $pip -r /requirements.txt \
    && $pip -r /requirements-torch.txt ${TORCH_PIP_ARGS}

FROM ${BASE}
COPY --from=packages /opt/venv /opt/venv
WORKDIR /app
COPY LICENSE NOTICE ./
COPY model model
COPY training training
# numba keeps its compiled kernels and matplotlib its font list where any user may write; runs and data lie in /work
RUN /opt/venv/bin/python -m compileall -q model training && mkdir -m 777 /work
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONPATH=/app \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    ORT_DISABLE_TELEMETRY=1 \
    HOME=/tmp \
    MPLCONFIGDIR=/tmp/matplotlib \
    NUMBA_CACHE_DIR=/tmp/numba
WORKDIR /work
USER 10001:10001
ENTRYPOINT ["python", "-m", "training"]
