#!/usr/bin/env bash
# Train an MLP memory from stored hidden states, with the paper's values. An interrupted run continues.
# Settings (environment variables; relative paths are from the repository's root):
#   MODEL DATASET KNN_SAVE_PATH DSTORE_PATH OUTPUT_DIR BASE_MODEL_NAME MEMORY_LAYERS
#   LEARNING_RATE EPOCHS WARMUP_STEPS ALPHA BATCH_SIZE GRADIENT_ACCUMULATION_STEPS SEED LOGGING_STEPS
#   BATCH_SIZE_EVAL CHECKPOINTING_STEPS TORCH_DTYPE
#   ACCELERATE_CONFIG    a file of accelerate_config/ (default: one process on each GPU)
# Fewer than 8 GPUs accumulate gradients to the paper's step of 128 windows.
# shellcheck source=scripts/train_memory.sh
. "$(dirname "${BASH_SOURCE[0]}")/train_memory.sh"

train_memory train_mlpmem_offline \
    --knn_dstore_path "${DSTORE_PATH:-./dstore/wikitext-gpt2-large/dstore_gpt2_train_1280.arrow}" "$@"
