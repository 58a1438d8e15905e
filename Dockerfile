# One image per service: docker build --target edge|history|inference .
# Each final stage copies its virtual environment from a build stage, so that the image contains no
# compiler, pip cache or wheels. Works with BuildKit and with Docker's old builder.
ARG BASE=python:3.12-slim-bookworm

FROM ${BASE} AS base
WORKDIR /app
ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
ENV PATH=/venv/bin:$PATH
RUN useradd --system finetunellm

FROM base AS edge-venv
RUN python -m venv /venv
COPY services/edge/requirements.txt .
RUN pip install -r requirements.txt

FROM base AS edge
COPY --from=edge-venv /venv /venv
COPY pyproject.toml .
COPY services/__init__.py services/
COPY services/contract services/contract
COPY services/runtime services/runtime
COPY services/client services/client
COPY services/edge services/edge
# Docker publishes no port by itself, so listening on all addresses exposes nothing.
ENV EDGE_HOST=0.0.0.0
USER finetunellm
EXPOSE 8002
CMD ["python", "-m", "services.edge"]

FROM base AS history-venv
RUN python -m venv /venv
COPY services/history/requirements.txt .
RUN pip install -r requirements.txt

FROM base AS history
COPY --from=history-venv /venv /venv
COPY pyproject.toml .
COPY services/__init__.py services/
COPY services/contract services/contract
COPY services/runtime services/runtime
COPY services/history services/history
USER finetunellm
CMD ["python", "-m", "services.history"]

FROM base AS llama-cpp-pin
COPY services/inference/requirements.txt .
RUN sed -n '/^llama-cpp-python==/,/[^\\]$/p' requirements.txt > llama-cpp-python.txt

FROM base AS inference-venv
RUN apt-get update && apt-get install -y --no-install-recommends build-essential
RUN python -m venv /venv
# Build llama.cpp first, from its pin alone: this slow layer is rebuilt only for a new version.
COPY --from=llama-cpp-pin /app/llama-cpp-python.txt .
# Images run on other CPUs: build for any x86-64 with AVX2, or any arm64.
ARG CMAKE_ARGS="-DLLAVA_BUILD=OFF -DGGML_NATIVE=OFF"
RUN CMAKE_ARGS="${CMAKE_ARGS}" pip install --no-deps -r llama-cpp-python.txt
COPY services/inference/requirements.txt .
RUN pip install -r requirements.txt

FROM base AS inference
# OpenMP, for llama.cpp's threads
RUN apt-get update && apt-get install -y --no-install-recommends libgomp1 \
    && rm -rf /var/lib/apt/lists/*
COPY --from=inference-venv /venv /venv
COPY pyproject.toml .
COPY services/__init__.py services/
COPY services/contract services/contract
COPY services/runtime services/runtime
COPY services/client services/client
COPY services/inference services/inference
USER finetunellm
CMD ["python", "-m", "services.inference"]
