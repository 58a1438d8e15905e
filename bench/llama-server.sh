#!/usr/bin/env bash
# Build llama-server in bench/.llama, once, from the llama.cpp version that we use.
# Takes about 6 minutes on two cores.
set -euo pipefail
cd "$(dirname "$0")"
[ -x .llama/llama-server ] && exit
../deploy/setup.sh llama-source
cmake -S ../.data/llama.cpp -B .llama/build -DCMAKE_BUILD_TYPE=Release \
    -DLLAMA_CURL=OFF -DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF
cmake --build .llama/build --target llama-server --parallel "$(nproc)"
ln -sf build/bin/llama-server .llama/llama-server
