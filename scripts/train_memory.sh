# shellcheck shell=bash
# Shared by the two training scripts: train_memory MODULE FLAGS..., with the paper's values where no variable is set.
# shellcheck source=scripts/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

train_memory() {
    find_python
    find_launcher
    # The paper's step has 8 batches of 16 windows: fewer GPUs accumulate as many.
    local steps="$((GPUS > 0 && GPUS < 8 ? (8 + GPUS - 1) / GPUS : 1))"
    run "train memory ${1##*_}" "${LAUNCH[@]}" -m "$1" \
        --model_name_or_path "${MODEL:-Rubin-Wei/gpt2-large-finetuned-wikitext103}" \
        --dataset_name "${DATASET:-./dataset/wikitext-gpt2}" --dataset_split_name train \
        --knn_save_path "${KNN_SAVE_PATH:-./dstore/wikitext-gpt2/knn_targets_train}" \
        --base_model_name "${BASE_MODEL_NAME:-large}" --output_dir "${OUTPUT_DIR:-./output/mlpmem-gpt2-large}" \
        --learning_rate "${LEARNING_RATE:-5e-4}" --num_warmup_steps "${WARMUP_STEPS:-2000}" --weight_decay 0.0 \
        --lr_scheduler_type linear --num_train_epochs "${EPOCHS:-50}" --alpha "${ALPHA:-0.5}" \
        --per_device_train_batch_size "${BATCH_SIZE:-16}" --per_device_eval_batch_size "${BATCH_SIZE_EVAL:-16}" \
        --gradient_accumulation_steps "${GRADIENT_ACCUMULATION_STEPS:-$steps}" --torch_dtype "${TORCH_DTYPE:-auto}" \
        --checkpointing_steps "${CHECKPOINTING_STEPS:-epoch}" --logging_steps "${LOGGING_STEPS:-10}" \
        --seed "${SEED:-42}" --report_to none ${MEMORY_LAYERS:+--memory_layers "$MEMORY_LAYERS"} "${@:2}"
}
