#!/usr/bin/env bash
# Train an MLP memory with the frozen base in the loop, with the paper's values. It continues where it stopped.
# Settings (environment variables; relative paths are from the repository's root):
#   MODEL DATASET KNN_SAVE_PATH OUTPUT_DIR BASE_MODEL_NAME MEMORY_LAYERS
#   LEARNING_RATE EPOCHS WARMUP_STEPS ALPHA BATCH_SIZE GRADIENT_ACCUMULATION_STEPS SEED LOGGING_STEPS
#   BATCH_SIZE_EVAL CHECKPOINTING_STEPS TORCH_DTYPE (default: bfloat16 on cards that have it)
#   ACCELERATE_CONFIG    a file of accelerate_config/ (default: 8_card.yaml, or none without a GPU)
# With fewer cards than the file's, one process runs on each. A step has the paper's 128 windows on any number of cards.
# shellcheck source=scripts/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
find_python

train_memory train_mlpmem_online "$@"
