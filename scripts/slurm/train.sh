#!/usr/bin/env bash
#SBATCH --job-name=mlpmem-train
#SBATCH --requeue
# Train a memory from stored hidden states, on all GPUs of the job. With ACCELERATE_CONFIG=accelerate_config/gpt2.yaml
# (or llama_7B, mistral_7B) its weights are sharded. A step has the paper's 128 windows on any number of
# GPUs; BATCH_SIZE counts windows of one process.
# Settings (environment): MODEL DATASET SUBSET KNN_SAVE_PATH STUDENT_DSTORE_PATH OUTPUT_DIR BASE_MODEL_NAME MEMORY_LAYERS
#   LEARNING_RATE EPOCHS WARMUP_STEPS ALPHA BATCH_SIZE GRADIENT_ACCUMULATION_STEPS CHECKPOINTING_STEPS SEED
# shellcheck source=scripts/slurm/common.sh
. "${MLPMEM_ROOT:-${SLURM_SUBMIT_DIR:-.}}/scripts/slurm/common.sh"
on_all_machines
export DSTORE_PATH="${STUDENT_DSTORE_PATH:-}"
export CHECKPOINTING_STEPS="${CHECKPOINTING_STEPS:-1000}"
. scripts/train_mlpmem_offline.sh --dataset_split_name "${SUBSET:-train}"
