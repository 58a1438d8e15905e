#!/usr/bin/env bash
# Build llama-server and llama-batched-bench in bench/.llama from the llama.cpp version that we use,
# once for each value of CMAKE_ARGS. Takes about 6 minutes on two cores.
set -euo pipefail
cd "$(dirname "$0")"
flags=${CMAKE_ARGS:-}
[ -x .llama/llama-server ] && [ "$(cat .llama/flags 2>/dev/null)" = "$flags" ] && exit
../deploy/setup.sh llama-source
rm -rf .llama
# shellcheck disable=SC2086 # several flags
cmake -S ../.data/llama.cpp -B .llama/build -DCMAKE_BUILD_TYPE=Release \
    -DLLAMA_CURL=OFF -DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF $flags
cmake --build .llama/build --target llama-server llama-batched-bench --parallel "$(nproc)"
ln -s build/bin/llama-server build/bin/llama-batched-bench .llama/
echo "$flags" >.llama/flags
