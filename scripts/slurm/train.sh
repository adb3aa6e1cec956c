#!/usr/bin/env bash
#SBATCH --job-name=mlpmem-train
#SBATCH --requeue
# Train a memory from stored hidden states, on all GPUs of the job. With ACCELERATE_CONFIG=accelerate_config/gpt2.yaml
# (or llama_7B, mistral_7B) its weights are sharded. BATCH_SIZE counts windows of one process.
# Settings (environment): MODEL DATASET KNN_SAVE_PATH STUDENT_DSTORE_PATH OUTPUT_DIR BASE_MODEL_NAME MEMORY_LAYERS
#   LEARNING_RATE EPOCHS WARMUP_STEPS ALPHA BATCH_SIZE GRADIENT_ACCUMULATION_STEPS CHECKPOINTING_STEPS SEED
# shellcheck source=scripts/slurm/common.sh
. "${MLPMEM_ROOT:-${SLURM_SUBMIT_DIR:-.}}/scripts/slurm/common.sh"

layers=()
[ -z "${MEMORY_LAYERS:-}" ] || layers=(--memory_layers "$MEMORY_LAYERS")
on_all "train memory" -m train_mlpmem_offline \
    --model_name_or_path "${MODEL:-Rubin-Wei/gpt2-large-finetuned-wikitext103}" \
    --dataset_name "${DATASET:-./dataset/wikitext-gpt2}" \
    --dataset_split_name "${SUBSET:-train}" \
    --knn_save_path "${KNN_SAVE_PATH:-./dstore/wikitext-gpt2/knn_targets_train}" \
    --knn_dstore_path "${STUDENT_DSTORE_PATH:-./dstore/wikitext-gpt2-large/dstore_gpt2_train_1280.arrow}" \
    --base_model_name "${BASE_MODEL_NAME:-large}" "${layers[@]}" \
    --output_dir "${OUTPUT_DIR:-./output/mlpmem-gpt2-large}" \
    --learning_rate "${LEARNING_RATE:-5e-4}" \
    --lr_scheduler_type linear \
    --num_warmup_steps "${WARMUP_STEPS:-2000}" \
    --num_train_epochs "${EPOCHS:-50}" \
    --alpha "${ALPHA:-0.5}" \
    --per_device_train_batch_size "${BATCH_SIZE:-16}" \
    --gradient_accumulation_steps "${GRADIENT_ACCUMULATION_STEPS:-1}" \
    --checkpointing_steps "${CHECKPOINTING_STEPS:-1000}" \
    --seed "${SEED:-42}" \
    --report_to none
