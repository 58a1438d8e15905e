#!/usr/bin/env bash
# Build llama-server and llama-batched-bench in bench/.llama from the llama.cpp version that we use.
# Rebuilds when that or CMAKE_ARGS change. Takes about 7 minutes on two cores.
set -euo pipefail
cd "$(dirname "$0")"
../deploy/setup.sh llama-source
flags=${CMAKE_ARGS:-}
built="$(cat ../.data/llama.cpp/of-llama-cpp-python) $flags"
[ -x .llama/llama-server ] && [ "$(cat .llama/built 2>/dev/null)" = "$built" ] && exit
rm -rf .llama
# shellcheck disable=SC2086 # several flags
cmake -S ../.data/llama.cpp -B .llama/build -DCMAKE_BUILD_TYPE=Release \
    -DLLAMA_CURL=OFF -DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF $flags
cmake --build .llama/build --target llama-server llama-batched-bench --parallel "$(nproc)"
ln -s build/bin/llama-server build/bin/llama-batched-bench .llama/
echo "$built" >.llama/built
