#!/usr/bin/env bash
# The paper's WikiText-103 table, measured beside published: bash scripts/reproduce_wikitext103.sh
#
# With TRAIN=1 the memory is trained here, from the kNN targets of the XL model, instead of taking the published one;
# `python -m knn_utils.sizes` says what that needs. Run it again and it continues where it stopped. Settings (environment
# variables; relative paths are from the repository's root):
#   LARGE_VANILLA LARGE XL   models: hub names or folders         (default: GPT-2 large, and the fine-tuned ones)
#   MEMORY                   the memory: hub name or folder       (default: the published one; ignored with TRAIN=1)
#   DATASET DATASET_CONFIG TOKENIZER   text and tokenizer         (default: WikiText-103, LARGE_VANILLA's)
#   WINDOWS                  an existing windows folder
#   OUTPUT                   folder of everything                 (default: results/wikitext103)
#   LAMBDA MEMORY_TEMP       mixture                              (default: 0.25 and 1)
#   ACCELERATE_CONFIG        a file of accelerate_config/         (default: one process on each GPU)
#   TORCH_DTYPE              of the models                        (default: auto)
#   BATCH_SIZE_EVAL NUM_PROC
# and with TRAIN=1 those of scripts/save_pipeline.sh and scripts/train_mlpmem_offline.sh: K PROBE NCENTROIDS CODE_SIZE
# INDEX_FACTORY EPOCHS BASE_MODEL_NAME MEMORY_LAYERS and the others.
# shellcheck source=scripts/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
find_python
find_launcher

WORK="${OUTPUT:=results/wikitext103}/work"
DONE="$WORK/done"
: "${LARGE_VANILLA:=openai-community/gpt2-large}" "${LARGE:=Rubin-Wei/gpt2-large-finetuned-wikitext103}"
: "${XL:=Clover-Hill/gpt2-xl-finetuned-wikitext103}" "${MEMORY:=Rubin-Wei/MLPMemory-gpt2-large}"
: "${TRAIN:=0}" "${EPOCHS:=50}" "${TORCH_DTYPE:=auto}" "${DATASET_CONFIG=wikitext-103-raw-v1}"

# 1. Text to token windows, 1024 tokens each, 512 apart.
if [ -z "${WINDOWS:-}" ]; then
    WINDOWS="$WORK/windows"
    once "windows" "$PYTHON" utils/preprocess_dataset.py --dataset_name "${DATASET:-Salesforce/wikitext}" \
        ${DATASET_CONFIG:+--dataset_config_name "$DATASET_CONFIG"} --tokenizer_path "${TOKENIZER:-$LARGE_VANILLA}" \
        --output_dir "$WINDOWS" --num_proc "${NUM_PROC:-4}"
fi

# 2. The base models on the test split.
base() {
    once "evaluate $1" "${LAUNCH[@]}" -m train_base --model_name_or_path "$2" --dataset_name "$WINDOWS" \
        --do_eval --eval_subset test --per_device_eval_batch_size "${BATCH_SIZE_EVAL:-8}" \
        --output_dir "$WORK/$1" --report_to none --torch_dtype "$TORCH_DTYPE"
}
base large_vanilla "$LARGE_VANILLA"
base large_finetuned "$LARGE"
base xl_finetuned "$XL"

# 3. The memory, from the larger model's neighbours and the smaller model's hidden states. The settings that are set stand
# in the commands, so that a changed one makes its stage run again.
given() {
    settings=()
    local name
    for name in "$@"; do [ -z "${!name:-}" ] || settings+=("$name=${!name}"); done
}
if [ "$TRAIN" = 1 ]; then
    given K PROBE KNN_TEMP NCENTROIDS CODE_SIZE INDEX_FACTORY NUM_KEYS_TO_ADD BATCH_SIZE_EVAL BATCH_SIZE_KNN \
        ACCELERATE_CONFIG TORCH_DTYPE PYTHON
    once "kNN targets of the teacher" env "${settings[@]}" MODEL_TO_SAVE="$XL" DATASET="$WINDOWS" SUBSET=train \
        DSTORE_DIR="$WORK/teacher" OUTPUT_DIR="$WORK/teacher_embed" OUTPUT_PATH="$WORK/targets" bash scripts/save_pipeline.sh
    once "datastore of the student" env "${settings[@]}" MODEL_TO_SAVE="$LARGE" DATASET="$WINDOWS" SUBSET=train \
        DSTORE_DIR="$WORK/student" OUTPUT_DIR="$WORK/student_embed" STAGES=datastore bash scripts/save_pipeline.sh
    student=$(find "$WORK/student" -maxdepth 1 -name 'dstore_*_train_*.arrow' -print -quit)
    given BASE_MODEL_NAME MEMORY_LAYERS LEARNING_RATE WARMUP_STEPS ALPHA BATCH_SIZE GRADIENT_ACCUMULATION_STEPS SEED \
        ACCELERATE_CONFIG TORCH_DTYPE PYTHON
    once "train the memory" env "${settings[@]}" MODEL="$LARGE" DATASET="$WINDOWS" KNN_SAVE_PATH="$WORK/targets" \
        DSTORE_PATH="$student" OUTPUT_DIR="$WORK/memory" EPOCHS="$EPOCHS" bash scripts/train_mlpmem_offline.sh
    MEMORY="$WORK/memory/epoch_$EPOCHS"
fi

# 4. Base and memory together, and the table.
once "evaluate large_memory" "${LAUNCH[@]}" -m evaluate_joint --do_test --model_name_or_path "$LARGE" \
    --dataset_name "$WINDOWS" --dataset_split_name test --per_device_eval_batch_size "${BATCH_SIZE_EVAL:-8}" \
    --output_dir "$WORK/large_memory" --memory_temp "${MEMORY_TEMP:-1}" --lmbda "${LAMBDA:-0.25}" \
    --knn_generator_path "$MEMORY" --report_to none --torch_dtype "$TORCH_DTYPE"
run "table" "$PYTHON" -m downstream.report wikitext103 --vanilla "$LARGE_VANILLA" --large "$LARGE" --xl "$XL" \
    --memory "$MEMORY" --train "$TRAIN" --output_dir "$OUTPUT"
echo "The stages took $(seconds_of_stages) s."
