#!/usr/bin/env bash
# Train an MLP memory with the frozen base in the loop, with the paper's values. It continues where it stopped.
# Settings (environment variables; relative paths are from the repository's root):
#   MODEL DATASET KNN_SAVE_PATH OUTPUT_DIR BASE_MODEL_NAME MEMORY_LAYERS
#   LEARNING_RATE EPOCHS WARMUP_STEPS ALPHA BATCH_SIZE GRADIENT_ACCUMULATION_STEPS SEED LOGGING_STEPS
#   BATCH_SIZE_EVAL CHECKPOINTING_STEPS
#   ACCELERATE_CONFIG    a file of accelerate_config/ (default: 8_card.yaml, or none without a GPU)
# shellcheck source=scripts/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
find_python
DEFAULT_CONFIG=8_card find_launcher

layers=()
[ -z "${MEMORY_LAYERS:-}" ] || layers=(--memory_layers "$MEMORY_LAYERS")
run "train memory online" "${LAUNCH[@]}" -m train_mlpmem_online \
    --model_name_or_path "${MODEL:-Rubin-Wei/gpt2-large-finetuned-wikitext103}" \
    --dataset_name "${DATASET:-./dataset/wikitext-gpt2}" \
    --dataset_split_name train \
    --knn_save_path "${KNN_SAVE_PATH:-./dstore/wikitext-gpt2/knn_targets_train}" \
    --base_model_name "${BASE_MODEL_NAME:-large}" "${layers[@]}" \
    --output_dir "${OUTPUT_DIR:-./output/mlpmem-gpt2-large}" \
    --learning_rate "${LEARNING_RATE:-5e-4}" \
    --weight_decay 0.0 \
    --lr_scheduler_type linear \
    --num_warmup_steps "${WARMUP_STEPS:-2000}" \
    --num_train_epochs "${EPOCHS:-50}" \
    --alpha "${ALPHA:-0.5}" \
    --per_device_train_batch_size "${BATCH_SIZE:-16}" \
    --per_device_eval_batch_size "${BATCH_SIZE_EVAL:-16}" \
    --gradient_accumulation_steps "${GRADIENT_ACCUMULATION_STEPS:-1}" \
    --checkpointing_steps "${CHECKPOINTING_STEPS:-epoch}" \
    --logging_steps "${LOGGING_STEPS:-10}" \
    --seed "${SEED:-42}" \
    --report_to none "$@"
