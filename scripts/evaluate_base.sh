#!/usr/bin/env bash
# Perplexity of the base model. Settings (environment variables; relative paths are from the repository's root):
#   MODEL DATASET SUBSET BATCH_SIZE_EVAL OUTPUT_DIR TORCH_DTYPE ACCELERATE_CONFIG
# shellcheck source=scripts/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
find_python
find_launcher

run "evaluate base" "${LAUNCH[@]}" -m train_base \
    --model_name_or_path "${MODEL:-Rubin-Wei/gpt2-large-finetuned-wikitext103}" \
    --dataset_name "${DATASET:-./dataset/wikitext-gpt2}" --per_device_eval_batch_size "${BATCH_SIZE_EVAL:-8}" \
    --do_eval --eval_subset "${SUBSET:-test}" --output_dir "${OUTPUT_DIR:-tmp/}" --report_to none \
    --torch_dtype "${TORCH_DTYPE:-auto}" "$@"
