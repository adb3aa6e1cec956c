# shellcheck shell=bash disable=SC2034
# Shared by all scripts: go to the repository's root, print each command before it runs, stop with the stage's name.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

STAGE="start"
status=0
trap 'status=$?; if [ "$status" -ne 0 ]; then echo "stopped in stage: $STAGE (exit status $status)" >&2; fi' EXIT

# run NAME COMMAND...: print the command, run it.
run() {
    STAGE="$1"
    shift
    printf '\n[%s]\n$' "$STAGE"
    printf ' %q' "$@"
    printf '\n'
    if [[ " $* " == *" accelerate.commands.launch "* ]]; then
        OMP_NUM_THREADS="${OMP_NUM_THREADS:-$THREADS}" "$@"
    else
        "$@"
    fi
}

# once NAME COMMAND...: like run, but skipped where the same command was completed before ($DONE holds the marks).
once() {
    local name="$1" mark
    mark="$DONE/$name"
    shift
    if [ -f "$mark" ] && [ "$(cat "$mark")" = "$(printf '%q ' "$@")" ]; then
        printf '\n[%s] done before\n' "$name"
        return
    fi
    mkdir -p "$DONE"
    if [ -f "$mark" ]; then
        # Other settings than before: whatever was completed after this stage rests on what it made then.
        find "$DONE" -type f -newer "$mark" -delete
        rm "$mark"
    fi
    local begin=$SECONDS
    run "$name" "$@"
    echo "$((SECONDS - begin))" >"$mark.seconds"
    printf '%q ' "$@" >"$mark.tmp"
    mv "$mark.tmp" "$mark"
}

# seconds_of_stages: what the completed stages took, added up over interrupted runs.
seconds_of_stages() { find "$DONE" -maxdepth 1 -name '*.seconds' -exec cat {} + | awk '{ sum += $1 } END { print sum + 0 }'; }

# PYTHON, which has the project's packages: the active environment's, else .venv's. And ONE, the beginning of a command
# for one process; a cluster's job brings its own, ON_ALL, for all processes of the job.
find_python() {
    if [ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ] && [ -x .venv/bin/python ]; then
        # shellcheck disable=SC1091
        . .venv/bin/activate
    fi
    PYTHON="${PYTHON:-python}" ONE=("${ON_ALL[@]:-${PYTHON:-python}}")
}

# install EXTRAS: make .venv unless an environment is active, and install the project's requirements once. A FAISS that is
# there stays (conda's has GPU code), so does a PyTorch with its NumPy; faiss-cpu is installed where there is no FAISS.
install() {
    local extras="$1" python="${PYTHON:-python3}" stamp wanted="$1" kept='^$'
    if [ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ]; then
        [ -x .venv/bin/python ] || run "make environment" "$python" -m venv .venv
        # shellcheck disable=SC1091
        . .venv/bin/activate
    fi
    PYTHON=python
    stamp="$(python -c 'import sys; print(sys.prefix)')/.mlpmemory-installed"
    python -c "import faiss" 2>/dev/null || wanted="cpu${extras:+,$extras}"
    if [ "$wanted" != "$extras" ] || ! cmp -s <(cat pyproject.toml constraints.txt && echo "$extras") "$stamp"; then
        ! python -c "import torch" 2>/dev/null || kept='^(torch|numpy)=='
        run "install" python -m pip install --quiet --constraint /dev/stdin ".${wanted:+[$wanted]}" \
            < <(grep -vE "$kept" constraints.txt)
        { cat pyproject.toml constraints.txt && echo "$extras"; } >"$stamp" 2>/dev/null || true
    fi
}

# count_cards: print how many GPUs a command sees here, 0 without any.
count_cards() {
    local cards
    cards="$(nvidia-smi -L 2>/dev/null | grep -c '^GPU ')" || true
    if [ "$cards" -gt 0 ] && [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
        cards="$(tr , '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c '^[^-]')" || true
    fi
    echo "$cards"
}

# share_of_cores PROCESSES: print the threads of each, of which accelerate gives it one where nobody says more.
share_of_cores() {
    local cores="${SLURM_CPUS_PER_TASK:-$(nproc)}"
    echo "$((cores > $1 ? cores / $1 : 1))"
}

# find_launcher: LAUNCH, the beginning of a command that may run in several processes of a machine, THREADS of each, ON_GPU,
# the flag of index and search, and GPUS, those of all machines that the command uses. ACCELERATE_CONFIG names a file;
# without one and without a GPU the command runs in one plain process. A file that asks for more cards than this machine
# has gets a process for each card.
find_launcher() {
    local cards machines wanted processes config
    LAUNCH=("${ONE[@]}") ON_GPU=() GPUS=0
    if [ -n "${ON_ALL+set}" ]; then
        ON_GPU=(--knn_gpu) GPUS="$((${SLURM_JOB_NUM_NODES:-1} * GPUS_PER_NODE))"
        return
    fi
    cards="$(count_cards)"
    [ -n "${ACCELERATE_CONFIG:-}" ] || [ "$cards" -gt 0 ] || return 0
    config="${ACCELERATE_CONFIG:-accelerate_config/${DEFAULT_CONFIG:-1_card}.yaml}"
    LAUNCH=("$PYTHON" -m accelerate.commands.launch --config_file "$config")
    machines="$(sed -n 's/^num_machines: *//p' "$config")"
    wanted="$(sed -n 's/^num_processes: *//p' "$config")"
    processes="$((${wanted:-1} / ${machines:=1}))"
    [ "$cards" -eq 0 ] || ON_GPU=(--knn_gpu)
    if [ "$cards" -gt 0 ] && ! grep -q '^use_cpu: true' "$config"; then
        if [ "$machines" -eq 1 ] && [ "$cards" -lt "$processes" ]; then
            echo "$config asks for $processes GPUs, this machine has $cards: one process for each"
            LAUNCH+=(--num_processes "$cards") processes="$cards"
        fi
        GPUS="$((processes * machines))"
    fi
    THREADS="$(share_of_cores "$processes")"
}

# choose_dtype: TORCH_DTYPE, unless it is set: bfloat16 where every GPU has it (compute capability 8.0 or more), float32
# where one is older. Without a GPU it stays empty, and nothing is passed.
choose_dtype() {
    local oldest
    [ -z "${TORCH_DTYPE:-}" ] && [ "$(count_cards)" -gt 0 ] || return 0
    oldest="$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | sort -n | sed -n 1p)" || true
    case "${oldest%%.*}" in [89] | [1-9][0-9]) TORCH_DTYPE=bfloat16 ;; *) TORCH_DTYPE=float32 ;; esac
    [ "$TORCH_DTYPE" = bfloat16 ] || echo "a GPU here has no bfloat16: models in float32 (TORCH_DTYPE)"
}

# add_given FLAG VARIABLE...: to the array `options` each flag whose variable is set, with its value.
add_given() {
    while [ $# -gt 0 ]; do
        [ -z "${!2:-}" ] || options+=("$1" "${!2}")
        shift 2
    done
}

# keep_step: the paper's step, 16 windows on each of 8 GPUs, on any number of them: GRADIENT_ACCUMULATION_STEPS or BATCH_SIZE
# of each process. Settings that are given stay.
keep_step() {
    if [ "$GPUS" -eq 0 ] || [ "$GPUS" -eq 8 ] || [ -n "${GRADIENT_ACCUMULATION_STEPS:-}" ]; then
        return
    elif [ "$((8 % GPUS))" -eq 0 ]; then
        GRADIENT_ACCUMULATION_STEPS="$((8 / GPUS))"
        echo "a step adds up $GRADIENT_ACCUMULATION_STEPS batches: as many windows as on 8 GPUs"
    elif [ -z "${BATCH_SIZE:-}" ] && [ "$((128 % GPUS))" -eq 0 ]; then
        BATCH_SIZE="$((128 / GPUS))"
        echo "a batch has $BATCH_SIZE windows: a step has as many as on 8 GPUs"
    else
        echo "a step takes $GPUS batches, on 8 GPUs 8: BATCH_SIZE sets the windows of each"
    fi
}

# train_memory MODULE FLAGS...: one of the two trainers, with the paper's values where no variable gives another.
train_memory() {
    local options=(--weight_decay 0.0 --lr_scheduler_type linear --report_to none)
    DEFAULT_CONFIG=8_card find_launcher
    keep_step
    choose_dtype
    add_given --memory_layers MEMORY_LAYERS --torch_dtype TORCH_DTYPE
    run "train memory ${1##*_}" "${LAUNCH[@]}" -m "$1" \
        --model_name_or_path "${MODEL:-Rubin-Wei/gpt2-large-finetuned-wikitext103}" \
        --dataset_name "${DATASET:-./dataset/wikitext-gpt2}" --dataset_split_name train \
        --knn_save_path "${KNN_SAVE_PATH:-./dstore/wikitext-gpt2/knn_targets_train}" \
        --base_model_name "${BASE_MODEL_NAME:-large}" --output_dir "${OUTPUT_DIR:-./output/mlpmem-gpt2-large}" \
        --learning_rate "${LEARNING_RATE:-5e-4}" --num_warmup_steps "${WARMUP_STEPS:-2000}" \
        --num_train_epochs "${EPOCHS:-50}" --alpha "${ALPHA:-0.5}" \
        --per_device_train_batch_size "${BATCH_SIZE:-16}" --per_device_eval_batch_size "${BATCH_SIZE_EVAL:-16}" \
        --gradient_accumulation_steps "${GRADIENT_ACCUMULATION_STEPS:-1}" \
        --checkpointing_steps "${CHECKPOINTING_STEPS:-epoch}" --logging_steps "${LOGGING_STEPS:-10}" \
        --seed "${SEED:-42}" "${options[@]}" "${@:2}"
}
