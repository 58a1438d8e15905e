#!/usr/bin/env bash
# Builds llama-server in bench/.llama, of the very llama.cpp that we run on: its source comes with the
# llama-cpp-python that uv.lock names. About 6 minutes on two cores, once.
set -euo pipefail
cd "$(dirname "$0")"
[ -x .llama/llama-server ] && exit
version=$(sed -n '/^name = "llama-cpp-python"/{n;s/version = "\(.*\)"/\1/p}' ../uv.lock)
mkdir -p .llama
[ -d .llama/llama_cpp_python-"$version" ] || {
    uv tool run --quiet pip download --quiet --no-deps --no-binary :all: --dest .llama "llama-cpp-python==$version"
    tar -C .llama -xzf .llama/llama_cpp_python-"$version".tar.gz
}
cmake -S .llama/llama_cpp_python-"$version"/vendor/llama.cpp -B .llama/build -DCMAKE_BUILD_TYPE=Release \
    -DLLAMA_CURL=OFF -DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF
cmake --build .llama/build --target llama-server --parallel "$(nproc)"
ln -sf build/bin/llama-server .llama/llama-server
