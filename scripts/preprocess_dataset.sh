#!/usr/bin/env bash
# Text to token windows. Settings (environment variables; relative paths are from the repository's root):
#   DATASET DATASET_CONFIG   hub name or folder, and its configuration  (default: WikiText-103)
#   TOKENIZER                tokenizer or model: hub name or folder     (default: gpt2)
#   OUTPUT_DIR NUM_PROC BLOCK_SIZE STRIDE
# shellcheck source=scripts/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
find_python

: "${DATASET_CONFIG=wikitext-103-raw-v1}"
run "preprocess" "$PYTHON" utils/preprocess_dataset.py --dataset_name "${DATASET:-Salesforce/wikitext}" \
    ${DATASET_CONFIG:+--dataset_config_name "$DATASET_CONFIG"} --tokenizer_path "${TOKENIZER:-gpt2}" \
    --output_dir "${OUTPUT_DIR:-./dataset/wikitext-gpt2}" \
    --block_size "${BLOCK_SIZE:-1024}" --stride "${STRIDE:-512}" --num_proc "${NUM_PROC:-1}" "$@"
