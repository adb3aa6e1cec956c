#!/usr/bin/env bash
# The paper's nine general tasks (zero-shot), by the evaluation harness: bash scripts/eval_general.sh
#
# Base and memory are written into one folder (python -m models.export), which the harness opens by itself. It needs the
# package lm-eval (pip install lm-eval). Relative paths count from the repository's root. Every setting is an environment
# variable:
#   MODEL            base model: folder or hub name               (default: mistralai/Mistral-7B-v0.3)
#   KNN_PATH         MLP memory: folder or hub name               (default: Rubin-Wei/MLPMemory-Mistral-wikipedia)
#   USE_NEURAL_KNN   1: base + memory; 0: the base alone          (default: 1)
#   LAMBDA MEMORY_TEMP  weight and temperature of the memory         (default: 0.50 and 1)
#   TASKS            tasks or groups, with commas between them    (default: mlpmem_general)
#   INCLUDE_PATH     folder of task files                         (default: downstream/general_tasks)
#   LIMIT            rows of each task at most                    (default: all)
#   BATCH_SIZE_EVAL  sequences in one forward pass                (default: 8)
#   TORCH_DTYPE DEVICE_MAP                                        (default: the checkpoint's; one device)
#   OUTPUT_DIR       folder of the results, and of the exported model  (default: results/general, results/general-base)
# Further flags go to lm_eval.
# shellcheck source=scripts/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
find_python

MODEL="${MODEL:-mistralai/Mistral-7B-v0.3}"
if [ "${USE_NEURAL_KNN:-1}" = 1 ]; then
    OUTPUT_DIR="${OUTPUT_DIR:-results/general}"
    run "export" "$PYTHON" -m models.export "$MODEL" "${KNN_PATH:-Rubin-Wei/MLPMemory-Mistral-wikipedia}" \
        "$OUTPUT_DIR/model" --lmbda "${LAMBDA:-0.50}" --memory_temp "${MEMORY_TEMP:-1}"
    MODEL="$OUTPUT_DIR/model,trust_remote_code=True"
fi
run "evaluate general tasks" "$PYTHON" -m lm_eval --model hf \
    --model_args "pretrained=$MODEL${TORCH_DTYPE:+,dtype=$TORCH_DTYPE}${DEVICE_MAP:+,device_map=$DEVICE_MAP}" \
    --tasks "${TASKS:-mlpmem_general}" \
    --include_path "${INCLUDE_PATH:-downstream/general_tasks}" --batch_size "${BATCH_SIZE_EVAL:-8}" \
    --output_path "${OUTPUT_DIR:-results/general-base}" ${LIMIT:+--limit "$LIMIT"} "$@"
