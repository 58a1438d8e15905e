#!/usr/bin/env bash
# Benchmark on an NVIDIA GPU: build llama.cpp with CUDA, run streams, burst, turns and arrivals, and
# write the tables to bench/results/gpu. Takes ten to fifteen minutes on 16 cores, most of it
# compiling. Needs `just`, cmake, a C++ compiler and the CUDA toolkit.
#
#   bench/gpu.sh               the synthetic models 500M and 135M, Q8_0
#   bench/gpu.sh MODEL.gguf …  models of your own
set -euo pipefail
cd "$(dirname "$0")/.."
PATH="$PWD/.venv/bin:$PWD/.data/bin:$PATH"
loads=streams,burst,turns,arrivals pairs=5 chats=1,2,4,8,16,64

die() {
    printf '%s\n' "$@" >&2
    exit 1
}

for program in nvidia-smi nvcc cmake just; do
    command -v "$program" >/dev/null || die "$program was not found: install it, or add it to PATH."
done
export CMAKE_ARGS=${CMAKE_ARGS:-"-DGGML_CUDA=on -DCMAKE_CUDA_ARCHITECTURES=native"}
export CMAKE_BUILD_PARALLEL_LEVEL=${CMAKE_BUILD_PARALLEL_LEVEL:-$(nproc)}

just _setup --group dev --group bench
python -c "import llama_cpp, sys; sys.exit(not llama_cpp.llama_supports_gpu_offload())" ||
    die "The llama.cpp in .venv was compiled without CUDA. Delete .venv and its cached wheel:" \
        'PATH=".data/bin:$PATH" uv cache clean llama-cpp-python && rm -rf .venv && bench/gpu.sh'
bench/llama-server.sh

models=("$@")
if [ $# = 0 ]; then
    for size in 500M 135M; do models+=("$(python -m bench.models "$size" Q8_0 | tail -n 1)"); done
fi
mkdir -p bench/results/gpu
for model in "${models[@]}"; do
    # the ceiling: llama.cpp alone, without samplers, with the tokens of `burst`
    name=$(basename "$model" .gguf)
    bench/.llama/llama-batched-bench -m "$model" -c 16384 -ngl 99 -npp 94 -ntg 64 -npl "$chats" \
        >.data/ceiling.log 2>&1 || die "llama-batched-bench failed: see .data/ceiling.log."
    {
        printf '# %s: llama-batched-bench\n\n' "$name"
        grep '^|' .data/ceiling.log
    } | tee "bench/results/gpu/$name-ceiling.md"
    python -m bench.compare --gguf "$model" --loads "$loads" --pairs "$pairs" --into bench/results/gpu
    # two workers that share the GPU
    python -m bench.compare --gguf "$model" --loads burst --pairs "$pairs" --workers 2 \
        --into bench/results/gpu/two-workers
done
echo "The tables are in bench/results/gpu."
