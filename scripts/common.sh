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
    "$@"
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
seconds_of_stages() { find "$DONE" -name '*.seconds' -exec cat {} + | awk '{ sum += $1 } END { print sum + 0 }'; }

# PYTHON, which has the project's packages: the active environment's, else .venv's. And ONE, the beginning of a command
# for one process; a cluster's job brings its own, ON_ALL, for all processes of the job.
find_python() {
    if [ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ] && [ -x .venv/bin/python ]; then
        # shellcheck disable=SC1091
        . .venv/bin/activate
    fi
    PYTHON="${PYTHON:-python}" ONE=("${ON_ALL[@]:-${PYTHON:-python}}")
}

# install EXTRAS: make .venv unless an environment is active, and install the project's requirements once.
install() {
    local extras="$1" python="${PYTHON:-python3}" stamp
    if [ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ]; then
        [ -x .venv/bin/python ] || run "make environment" "$python" -m venv .venv
        # shellcheck disable=SC1091
        . .venv/bin/activate
    fi
    PYTHON=python
    stamp="$(python -c 'import sys; print(sys.prefix)')/.mlpmemory-installed"
    if ! cmp -s <(cat pyproject.toml constraints.txt && echo "$extras") "$stamp"; then
        run "install" python -m pip install --quiet --constraint constraints.txt ".${extras:+[$extras]}"
        { cat pyproject.toml constraints.txt && echo "$extras"; } >"$stamp" 2>/dev/null || true
    fi
}

# find_launcher: LAUNCH, the beginning of a command that may run on several processes, and GPU_SEARCH.
# ACCELERATE_CONFIG names a file; without one and without a GPU the command runs in one plain process.
find_launcher() {
    LAUNCH=("${ONE[@]}") GPU_SEARCH=()
    if [ -n "${ON_ALL+set}" ]; then
        GPU_SEARCH=(--knn_gpu)
        return
    fi
    if [ -z "${ACCELERATE_CONFIG:-}" ] && command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then
        ACCELERATE_CONFIG="accelerate_config/${DEFAULT_CONFIG:-1_card}.yaml"
    fi
    if [ -n "${ACCELERATE_CONFIG:-}" ]; then
        LAUNCH=("$PYTHON" -m accelerate.commands.launch --config_file "$ACCELERATE_CONFIG")
        if nvidia-smi -L >/dev/null 2>&1; then GPU_SEARCH=(--knn_gpu); fi
    fi
}

# add_given FLAG VARIABLE...: to the array `options` each flag whose variable is set, with its value.
add_given() {
    while [ $# -gt 0 ]; do
        [ -z "${!2:-}" ] || options+=("$1" "${!2}")
        shift 2
    done
}

# train_memory MODULE FLAGS...: one of the two trainers, with the paper's values where no variable gives another.
train_memory() {
    local options=(--weight_decay 0.0 --lr_scheduler_type linear --report_to none)
    DEFAULT_CONFIG=8_card find_launcher
    add_given --memory_layers MEMORY_LAYERS
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
