# Three images from one file:
#   api    the API, the control worker and the migration; no torch
#   hf     an engine worker on Hugging Face transformers, for CPUs and single GPUs
#   vllm   an engine worker on vLLM, for NVIDIA GPUs

ARG PYTHON_IMAGE=python:3.11.14-slim-trixie
# One of the versions in pyproject.toml's extra `vllm`.
ARG VLLM_IMAGE=vllm/vllm-openai:v0.32.0

FROM ${PYTHON_IMAGE} AS wheel
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY jobs jobs
COPY engine engine
COPY storage storage
COPY migrations migrations
RUN --mount=type=cache,target=/root/.cache/pip \
    pip wheel --no-deps --wheel-dir /wheels .

FROM ${PYTHON_IMAGE} AS base
ENV PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    BATCHCTL_DATA=/data
# What is made here belongs to the user, and so does a new volume that is mounted over it.
RUN useradd --uid 10001 --create-home batchctl \
    && install --directory --owner=batchctl --group=batchctl /data /cache
COPY constraints.txt /constraints.txt

# Dependencies first: they change less often than the code, and their layers are kept.
FROM base AS api
RUN --mount=type=cache,target=/root/.cache/pip \
    --mount=type=bind,from=wheel,source=/src/pyproject.toml,target=/src/pyproject.toml \
    cd /src && python -c 'import tomllib; p = tomllib.load(open("pyproject.toml", "rb"))["project"]; print("\n".join(p["dependencies"] + p["optional-dependencies"]["server"]))' > /requirements.txt \
    && pip install --constraint /constraints.txt --requirement /requirements.txt
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    pip install --no-deps /wheels/*.whl && pip check \
    && python -c "import kombu.transport.redis, jobs.worker.tasks, jobs.api.app"
USER batchctl
WORKDIR /data
EXPOSE 8000 9100
ENTRYPOINT ["batchctl"]
CMD ["serve", "--help"]

FROM base AS hf
ARG PIP_EXTRA_INDEX_URL=
RUN --mount=type=cache,target=/root/.cache/pip \
    --mount=type=bind,from=wheel,source=/src/pyproject.toml,target=/src/pyproject.toml \
    cd /src && python -c 'import tomllib; p = tomllib.load(open("pyproject.toml", "rb"))["project"]; e = p["optional-dependencies"]; print("\n".join(p["dependencies"] + e["server"] + e["hf"]))' > /requirements.txt \
    && pip install --constraint /constraints.txt --requirement /requirements.txt
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    pip install --no-deps /wheels/*.whl && pip check \
    && python -c "import kombu.transport.redis, jobs.worker.tasks, jobs.api.app"
USER batchctl
WORKDIR /data
EXPOSE 9100
ENTRYPOINT ["batchctl"]
CMD ["worker", "--role", "engine"]

FROM ${VLLM_IMAGE} AS vllm
ENV PIP_BREAK_SYSTEM_PACKAGES=1 \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    BATCHCTL_DATA=/data
USER root
RUN useradd --uid 10001 --create-home batchctl \
    && install --directory --owner=batchctl --group=batchctl /data /cache
# What the image brings stays as it is: vLLM, torch and CUDA were built for one another.
RUN --mount=type=cache,target=/root/.cache/pip \
    --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    python3 -m pip freeze | grep '==' > /base.txt \
    && python3 -m pip install --constraint /base.txt "$(ls /wheels/*.whl)[server,vllm]"
USER batchctl
WORKDIR /data
EXPOSE 9100
ENTRYPOINT ["batchctl"]
CMD ["worker", "--role", "engine"]
