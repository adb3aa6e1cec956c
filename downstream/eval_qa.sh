#!/usr/bin/env bash
# Question answering with base + MLP memory: bash downstream/eval_qa.sh
#
# Relative paths count from the repository's root. Every setting is an environment variable:
#   MODEL            base model: folder or hub name               (default: mistralai/Mistral-7B-v0.3)
#   KNN_PATH         MLP memory: folder or hub name               (default: Rubin-Wei/MLPMemory-Mistral-wikipedia)
#   USE_NEURAL_KNN   1: base + memory; 0: the base alone          (default: 1)
#   LAMBDA MEMORY_TEMP  weight and temperature of the memory         (default: 0.50 and 1)
#   TASK             some of nq hotpotqa triviaqa webqa truthfulqa halueval halueval_plain halueval_judge
#                                                                 (default: nq hotpotqa; with DATASET: nq)
#   DATASET          questions: file, folder or hub name          (default: the task's dataset on the hub)
#   DATASET_CONFIG SUBSET                                         (default: the task's)
#   PROMPT_FILE      the benchmark's prompt text, where TASK needs one
#   START MAX_EVAL_SAMPLES                                        (default: all rows)
#   BATCH_SIZE_EVAL  sequences in one forward pass                (default: 8)
#   TORCH_DTYPE DEVICE_MAP                                        (default: float16 on a GPU; one device)
#   OUTPUT_DIR       predictions.jsonl and results.json           (default: results/qa, a folder for each task there)
# shellcheck source=scripts/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/../scripts/common.sh"
find_python

tasks="nq hotpotqa" suffix=-base options=()
[ -z "${DATASET:-}" ] || tasks=nq
if [ "${USE_NEURAL_KNN:-1}" = 1 ]; then
    options+=(--use_neural_knn --knn_generator_path "${KNN_PATH:-Rubin-Wei/MLPMemory-Mistral-wikipedia}")
    options+=(--lmbda "${LAMBDA:-0.50}" --memory_temp "${MEMORY_TEMP:-1}")
    suffix=""
fi
for pair in dataset_name=DATASET dataset_config_name=DATASET_CONFIG eval_subset=SUBSET prompt_file=PROMPT_FILE start=START \
    max_eval_samples=MAX_EVAL_SAMPLES torch_dtype=TORCH_DTYPE device_map=DEVICE_MAP; do
    name="${pair#*=}"
    [ -z "${!name:-}" ] || options+=("--${pair%=*}" "${!name}")
done

for task in ${TASK:-$tasks}; do
    run "evaluate $task" "$PYTHON" -m downstream.eval_qa \
        --model_name_or_path "${MODEL:-mistralai/Mistral-7B-v0.3}" \
        --task "$task" \
        --do_eval \
        --per_device_eval_batch_size "${BATCH_SIZE_EVAL:-8}" \
        --output_dir "${OUTPUT_DIR:-results/qa}/$task$suffix" \
        ${options[@]+"${options[@]}"} "$@"
done
