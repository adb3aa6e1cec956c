# shellcheck shell=bash disable=SC2034
# Shared by all scripts: change to the repository's root, print each command before it runs, name the stage that failed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

STAGE="start"
status=0
trap 'status=$?; if [ "$status" -ne 0 ]; then echo "stopped in stage: $STAGE (exit status $status)" >&2; fi' EXIT

# run NAME COMMAND...: print the command, then run it.
run() {
    STAGE="$1"
    shift
    printf '\n[%s]\n$' "$STAGE"
    printf ' %q' "$@"
    printf '\n'
    "$@"
}

# once NAME COMMAND...: like run, but skipped if the same command has completed before. $DONE holds a file for each.
once() {
    local name="$1" mark="$DONE/$1" begin=$SECONDS
    shift
    if [ -f "$mark" ] && [ "$(cat "$mark")" = "$(printf '%q ' "$@")" ]; then
        printf '\n[%s] done before\n' "$name"
        return
    fi
    mkdir -p "$DONE"
    # With other settings than before, the stages that completed after this one have to run again.
    [ ! -f "$mark" ] || { find "$DONE" -type f -newer "$mark" -delete && rm "$mark"; }
    run "$name" "$@"
    echo "$((SECONDS - begin))" >"$mark.seconds"
    printf '%q ' "$@" >"$mark.tmp"
    mv "$mark.tmp" "$mark"
}

# seconds_of_stages: the time of the completed stages, added up over interrupted runs.
seconds_of_stages() { find "$DONE" -maxdepth 1 -name '*.seconds' -exec cat {} + | awk '{ sum += $1 } END { print sum + 0 }'; }

# find_python: PYTHON, of the active environment, else of .venv.
find_python() {
    # shellcheck disable=SC1091
    if [ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ] && [ -x .venv/bin/python ]; then . .venv/bin/activate; fi
    export PYTHON="${PYTHON:-python}"
}

# install EXTRAS: make .venv unless an environment is active, and install the requirements once. A FAISS or PyTorch that is
# installed already (conda's, with GPU code) stays.
install() {
    local extras="$1" kept='^$' stamp
    if [ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ] && [ ! -x .venv/bin/python ]; then
        run "make environment" "${PYTHON:-python3}" -m venv .venv
    fi
    PYTHON=python
    find_python
    stamp="$(python -c 'import sys; print(sys.prefix)')/.mlpmemory-installed"
    python -c "import faiss" 2>/dev/null || extras="cpu${extras:+,$extras}"
    if ! cmp -s <(cat pyproject.toml constraints.txt && echo "$1") "$stamp" || [ "$extras" != "$1" ]; then
        ! python -c "import torch" 2>/dev/null || kept='^(torch|numpy)=='
        run "install" python -m pip install --quiet --constraint /dev/stdin ".${extras:+[$extras]}" \
            < <(grep -vE "$kept" constraints.txt)
        { cat pyproject.toml constraints.txt && echo "$1"; } >"$stamp" 2>/dev/null || true
    fi
}

# find_launcher: LAUNCH, the first words of a command. With GPUs that is `accelerate launch`, which starts a process on each;
# ACCELERATE_CONFIG names a file of accelerate_config/, LAUNCHER other words. GPUS counts them, ON_GPU is FAISS's flag. GPUs that
# PyTorch cannot use (a build without CUDA, an old driver) are an error, unless MLPMEM_CPU=1.
find_launcher() {
    GPUS=0 ON_GPU=() LAUNCH=("$PYTHON")
    if command -v nvidia-smi >/dev/null && [ "${MLPMEM_CPU:-0}" != 1 ]; then
        GPUS="$("$PYTHON" -c 'import torch; print(torch.cuda.device_count())')"
        local cards
        cards="$(nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true)"
        if [ "$GPUS" -eq 0 ] && [ "$cards" -gt 0 ] && [ "${CUDA_VISIBLE_DEVICES-all}" = all ]; then
            echo "error: nvidia-smi lists $cards GPUs, but PyTorch can use none: install a build for this driver's CUDA version" \
                "(pytorch.org), or set MLPMEM_CPU=1 to run on the CPU" >&2
            exit 2
        fi
    fi
    if [ "$GPUS" -gt 0 ]; then
        ON_GPU=(--knn_gpu) LAUNCH=("$PYTHON" -m accelerate.commands.launch --mixed_precision bf16)
        export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((($(nproc) + GPUS - 1) / GPUS))}"
    fi
    [ -z "${ACCELERATE_CONFIG:-}" ] || LAUNCH=("$PYTHON" -m accelerate.commands.launch --config_file "$ACCELERATE_CONFIG")
    [ -z "${LAUNCHER:-}" ] || read -ra LAUNCH <<<"$LAUNCHER"
}
