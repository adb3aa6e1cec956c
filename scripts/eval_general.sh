#!/usr/bin/env bash
# The paper's nine general tasks (zero-shot), through the evaluation harness: bash scripts/eval_general.sh
#
# Needs the package lm-eval (pip install lm-eval). Relative paths count from the repository's root. Every setting is an
# environment variable:
#   MODEL            base model: folder or hub name               (default: mistralai/Mistral-7B-v0.3)
#   KNN_PATH         MLP memory: folder or hub name               (default: Rubin-Wei/MLPMemory-Mistral-wikipedia)
#   USE_NEURAL_KNN   1: base + memory; 0: the base alone          (default: 1)
#   LAMBDA KNN_TEMP  weight and temperature of the memory         (default: 0.50 and 1)
#   TASKS            tasks or groups, with commas between them    (default: mlpmem_general)
#   INCLUDE_PATH     folder of further task files                 (default: none)
#   LIMIT            rows of each task at most                    (default: all)
#   BATCH_SIZE_EVAL  sequences in one forward pass                (default: 8)
#   TORCH_DTYPE DEVICE_MAP                                        (default: float16 on a GPU; one device)
#   OUTPUT_DIR       folder of results.json                       (default: results/general, results/general-base)
# shellcheck source=scripts/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
find_python

options=()
if [ "${USE_NEURAL_KNN:-1}" = 1 ]; then
    options+=(--use_neural_knn --knn_generator_path "${KNN_PATH:-Rubin-Wei/MLPMemory-Mistral-wikipedia}")
    options+=(--lmbda "${LAMBDA:-0.50}" --knn_temp "${KNN_TEMP:-1}")
    OUTPUT_DIR="${OUTPUT_DIR:-results/general}"
fi
add_given --include_path INCLUDE_PATH --limit LIMIT --torch_dtype TORCH_DTYPE --device_map DEVICE_MAP

run "evaluate general tasks" "$PYTHON" -m downstream.lm_eval_mlpmem \
    --model_name_or_path "${MODEL:-mistralai/Mistral-7B-v0.3}" --tasks "${TASKS:-mlpmem_general}" \
    --per_device_eval_batch_size "${BATCH_SIZE_EVAL:-8}" --output_dir "${OUTPUT_DIR:-results/general-base}" \
    ${options[@]+"${options[@]}"} "$@"
