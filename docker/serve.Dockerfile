# The service, without torch. From the root of the repository:
#   docker build -f docker/serve.Dockerfile -t indrnn-service .
#   docker build -f docker/serve.Dockerfile -t indrnn-service:gpu --build-arg DEVICE=gpu .
ARG BASE=python:3.11-slim-bookworm

FROM ${BASE} AS packages
# cpu or gpu: which onnxruntime
ARG DEVICE=cpu
# pip reads these where they are set; this stage, and what it was told, does not end up in the image
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ARG PIP_TRUSTED_HOST
COPY requirements-${DEVICE}.txt /requirements.txt
RUN --mount=type=cache,target=/root/.cache/pip \
    python3 -m venv --without-pip /opt/venv \
    && python3 -m pip --python /opt/venv/bin/python install --disable-pip-version-check --no-warn-script-location -r /requirements.txt

FROM ${BASE}
WORKDIR /app
COPY --from=packages /opt/venv /opt/venv
COPY LICENSE NOTICE ./
# the modules of `model` that both halves share
COPY model/__init__.py model/contract.py model/events.py model/skeletons.py model/
COPY service service
# compiled here, for the root file system may be read-only; /models takes the user's own models
RUN /opt/venv/bin/python -m compileall -q model service && mkdir /models
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    ORT_DISABLE_TELEMETRY=1 \
    INDRNN_HOST=0.0.0.0 \
    INDRNN_PORT=8000 \
    INDRNN_MODELS=/models
USER 10001:10001
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 \
    CMD ["python", "-c", "import http.client, os, sys; c = http.client.HTTPConnection('127.0.0.1', int(os.environ['INDRNN_PORT']), timeout=4); c.request('GET', '/health/ready'); sys.exit(c.getresponse().status != 200)"]
ENTRYPOINT ["python", "-m", "service"]
