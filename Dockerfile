# One image per service: docker build --target edge|history|inference .
ARG BASE=python:3.12-slim-bookworm

FROM ${BASE} AS base
WORKDIR /app
ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN useradd --system finetunellm

FROM base AS edge
COPY services/edge/requirements.txt .
RUN pip install -r requirements.txt
COPY services/__init__.py services/
COPY services/contract services/contract
COPY services/runtime services/runtime
COPY services/client services/client
COPY services/edge services/edge
USER finetunellm
EXPOSE 8002
CMD ["python", "-m", "services.edge"]

FROM base AS history
COPY services/history/requirements.txt .
RUN pip install -r requirements.txt
COPY services/__init__.py services/
COPY services/contract services/contract
COPY services/runtime services/runtime
COPY services/history services/history
USER finetunellm
CMD ["python", "-m", "services.history"]

# llama.cpp is compiled here, and the compiler stays behind.
FROM base AS inference-wheels
RUN apt-get update && apt-get install -y --no-install-recommends build-essential
COPY services/inference/requirements.txt .
# Not for the CPU it is built on, but for any x86-64 with AVX2 (or any arm64): an image moves.
ARG CMAKE_ARGS="-DLLAVA_BUILD=OFF -DGGML_NATIVE=OFF"
RUN CMAKE_ARGS="${CMAKE_ARGS}" pip wheel --wheel-dir /wheels -r requirements.txt

FROM base AS inference
# llama.cpp's threads are OpenMP's
RUN apt-get update && apt-get install -y --no-install-recommends libgomp1 \
    && rm -rf /var/lib/apt/lists/*
RUN --mount=type=bind,from=inference-wheels,source=/wheels,target=/wheels pip install /wheels/*.whl
COPY services/__init__.py services/
COPY services/contract services/contract
COPY services/runtime services/runtime
COPY services/inference services/inference
USER finetunellm
CMD ["python", "-m", "services.inference"]
