# One image per service: docker build --target edge|history|inference|secrets .
# Each final stage copies its virtual environment from a build stage, so that the image contains no
# compiler, pip or wheels. Works with BuildKit and with Docker's old builder.
# GPUs: deploy/compose/cuda.yml, rocm.yml and vulkan.yml have the build arguments.
ARG BASE=python:3.12-slim-bookworm@sha256:54c85f3c47607a77f32adec749d3c81d1348bf25833671f512b26a9b6d778cb3
# Where llama.cpp is compiled; it needs the same Python at the same path as BASE.
ARG BUILD_BASE=${BASE}

FROM ${BASE} AS base
WORKDIR /app
ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
ENV PATH=/venv/bin:$PATH
RUN useradd --system --uid 999 finetunellm
LABEL org.opencontainers.image.licenses="MIT"

FROM base AS pip
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1

FROM pip AS edge-venv
RUN python3 -m venv /venv
COPY services/edge/requirements.txt .
RUN pip install -r requirements.txt && pip uninstall --yes pip setuptools

FROM base AS edge
LABEL org.opencontainers.image.title="finetunellm-edge" \
    org.opencontainers.image.description="HTTP APIs and chat page of FineTuneLLM"
COPY --from=edge-venv /venv /venv
COPY pyproject.toml .
COPY services/__init__.py services/
COPY services/contract services/contract
COPY services/runtime services/runtime
COPY services/client services/client
COPY services/edge services/edge
# The file system may be read-only, and each health check starts a process: compile once.
RUN python -m compileall -q services
# Docker publishes no port by itself, so listening on all addresses exposes nothing.
ENV EDGE_HOST=0.0.0.0
USER 999
EXPOSE 8002
# http.client ignores http_proxy in the environment; urllib would use it
HEALTHCHECK --interval=10s --timeout=10s --start-period=30s CMD ["python", "-c", "import http.client, os; c = http.client.HTTPConnection('127.0.0.1', int(os.environ.get('EDGE_PORT') or 8002), timeout=5); c.request('GET', '/healthz'); exit(c.getresponse().status != 200)"]
CMD ["python", "-m", "services.edge"]

# Makes the keys of NATS users in volumes, as root, and hands each to the user of its service.
# Those of nats-server, whose image has no user, stay root's.
FROM edge AS secrets
LABEL org.opencontainers.image.title="finetunellm-secrets" \
    org.opencontainers.image.description="Makes the keys of NATS users of FineTuneLLM"
COPY deploy/__init__.py deploy/child.py deploy/generated.py deploy/lock.py deploy/
COPY deploy/nats deploy/nats
USER root
HEALTHCHECK NONE
ENTRYPOINT ["sh", "-c", "python -m deploy.nats.secrets \"$@\" && chown -R finetunellm .data/secrets && chown -R root .data/secrets/nats-server", "secrets"]
CMD []

FROM pip AS history-venv
RUN python3 -m venv /venv
COPY services/history/requirements.txt .
RUN pip install -r requirements.txt && pip uninstall --yes pip setuptools

FROM base AS history
LABEL org.opencontainers.image.title="finetunellm-history" \
    org.opencontainers.image.description="Sessions of FineTuneLLM"
COPY --from=history-venv /venv /venv
COPY pyproject.toml .
COPY services/__init__.py services/
COPY services/contract services/contract
COPY services/runtime services/runtime
COPY services/history services/history
RUN python -m compileall -q services
ENV METRICS_HOST=0.0.0.0
USER 999
# The CPU is usually busy, and the check starts a Python process: 15 s.
HEALTHCHECK --interval=10s --timeout=15s --start-period=30s CMD ["python", "-m", "services.runtime.health", "history"]
CMD ["python", "-m", "services.history"]

FROM base AS llama-cpp-pin
COPY services/inference/requirements.txt .
RUN sed -n '/^llama-cpp-python==/,/[^\\]$/p' requirements.txt > llama-cpp-python.txt

FROM ${BUILD_BASE} AS inference-venv
WORKDIR /app
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PATH=/venv/bin:$PATH
# Debian packages that a backend needs for compiling, and its options of llama.cpp
ARG BUILD_PACKAGES=""
ARG BACKEND=""
RUN apt-get update && apt-get install -y --no-install-recommends build-essential ${BUILD_PACKAGES}
RUN python3 -m venv /venv
# Build llama.cpp first, from its pin alone: this slow layer is rebuilt only for a new version.
COPY --from=llama-cpp-pin /app/llama-cpp-python.txt .
# Images run on other CPUs. On x86-64, compile the kernels once for each generation of CPUs: ggml
# loads the best ones when a worker starts. On arm64 that needs a newer compiler than Debian 12's.
# Libraries are installed beside those of llama-cpp-python, where the worker looks for backends, and
# not a second time below lib/.
RUN variants=$([ "$(uname -m)" = x86_64 ] && echo ON || echo OFF) \
    && CMAKE_ARGS="-DLLAVA_BUILD=OFF -DGGML_NATIVE=OFF -DGGML_BACKEND_DL=ON \
        -DGGML_CPU_ALL_VARIANTS=$variants -DCMAKE_INSTALL_BINDIR=llama_cpp/lib \
        -DCMAKE_INSTALL_LIBDIR=llama_cpp/lib ${BACKEND}" \
    pip install --no-deps -r llama-cpp-python.txt
COPY services/inference/requirements.txt .
RUN pip install -r requirements.txt && pip uninstall --yes pip setuptools
# A wheel has no links but each library under three names, and llama.cpp's library for its tools.
RUN cd /venv/lib/python3*/site-packages/llama_cpp/lib && rm -r libllama-common.so* cmake pkgconfig \
    && for file in *.so.*.*; do ln -sf "$file" "${file%.*.*}"; ln -sf "$file" "${file%.*.*.*}"; done

FROM base AS inference
LABEL org.opencontainers.image.title="finetunellm-inference" \
    org.opencontainers.image.description="A worker of FineTuneLLM, which computes answers with llama.cpp"
ARG RUN_PACKAGES=""
# OpenMP, for llama.cpp's threads
RUN apt-get update && apt-get install -y --no-install-recommends libgomp1 ${RUN_PACKAGES} \
    && rm -rf /var/lib/apt/lists/*
COPY --from=inference-venv /venv /venv
COPY pyproject.toml .
COPY services/__init__.py services/
COPY services/contract services/contract
COPY services/runtime services/runtime
COPY services/client services/client
COPY services/inference services/inference
RUN python -m compileall -q services
ENV METRICS_HOST=0.0.0.0
USER 999
# Loading a large model takes minutes.
HEALTHCHECK --interval=10s --timeout=15s --start-period=5m CMD ["python", "-m", "services.runtime.health", "inference"]
CMD ["python", "-m", "services.inference"]
