#!/usr/bin/env bash
# Perplexity of base + MLP memory. Settings (environment variables; relative paths are from the repository's root):
#   MODEL KNN_PATH DATASET SUBSET BATCH_SIZE_EVAL OUTPUT_DIR TORCH_DTYPE ACCELERATE_CONFIG
#   LAMBDA MEMORY_TEMP   one or several values each; all combinations are scored in one pass
# shellcheck source=scripts/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
find_python
find_launcher

read -r -a lmbda <<<"${LAMBDA:-0.25}"
read -r -a temperature <<<"${MEMORY_TEMP:-1}"
run "evaluate joint" "${LAUNCH[@]}" -m evaluate_joint \
    --do_test --model_name_or_path "${MODEL:-Rubin-Wei/gpt2-large-finetuned-wikitext103}" \
    --dataset_name "${DATASET:-./dataset/wikitext-gpt2}" --dataset_split_name "${SUBSET:-test}" \
    --per_device_eval_batch_size "${BATCH_SIZE_EVAL:-8}" --output_dir "${OUTPUT_DIR:-tmp/}" \
    --knn_temp "${temperature[@]}" --lmbda "${lmbda[@]}" \
    --knn_generator_path "${KNN_PATH:-Rubin-Wei/MLPMemory-gpt2-large}" --report_to none \
    --torch_dtype "${TORCH_DTYPE:-auto}" "$@"
