#!/usr/bin/env bash
# The paper's WikiText-103 table, measured beside published: bash scripts/reproduce_wikitext103.sh
#
# With TRAIN=1 the memory is trained here, from the kNN targets of the XL model, in place of the published one.
# That begins with an estimate of disk, GPU memory and time. It continues where it stopped when it is run again.
# scripts/standins.sh runs the same chain with tiny models. Settings (environment variables; relative paths are from
# the repository's root):
#   LARGE_VANILLA LARGE XL   models: hub names or folders         (default: GPT-2 large, and the fine-tuned ones)
#   SMALL_VANILLA SMALL      a smaller GPT-2 and it fine-tuned, for two further rows of the table (default: none)
#   MEMORY                   the memory: hub name or folder       (default: the published one; not read with TRAIN=1)
#   DATASET DATASET_CONFIG TOKENIZER   text and tokenizer         (default: WikiText-103, LARGE_VANILLA's)
#   WINDOWS                  a windows folder that is there already
#   OUTPUT                   folder of everything                 (default: results/wikitext103)
#   LAMBDA KNN_TEMP_MEMORY   mixture                              (default: 0.25 and 1)
#   ACCELERATE_CONFIG        a file of accelerate_config/         (default on GPUs: 1_card.yaml, for the training 8_card.yaml)
#   TORCH_DTYPE              of the models                        (default: bfloat16 on cards that have it)
#   BATCH_SIZE_EVAL NUM_PROC PLAN_ONLY=1
# and with TRAIN=1 those of scripts/save_pipeline.sh and scripts/train_mlpmem_offline.sh: K PROBE NCENTROIDS CODE_SIZE
# INDEX_FACTORY EPOCHS BASE_MODEL_NAME MEMORY_LAYERS and the others. STANDINS=1 is said in the table.
# shellcheck source=scripts/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
find_python
find_launcher
choose_dtype

WORK="${OUTPUT:=results/wikitext103}/work"
DONE="$WORK/done"
windows="${WINDOWS:-$WORK/windows}"
: "${LARGE_VANILLA:=openai-community/gpt2-large}" "${LARGE:=Rubin-Wei/gpt2-large-finetuned-wikitext103}"
: "${XL:=Clover-Hill/gpt2-xl-finetuned-wikitext103}" "${MEMORY:=Rubin-Wei/MLPMemory-gpt2-large}"
: "${TRAIN:=0}" "${EPOCHS:=50}"
[ "$TRAIN" != 1 ] || MEMORY="$WORK/memory/epoch_$EPOCHS"
precision=(${TORCH_DTYPE:+--torch_dtype "$TORCH_DTYPE"})

# 1. What training here will take, on one large GPU: of the teacher's plan the datastore, index and targets count, of the
# student's the datastore and the memory. Models and windows that are there say their sizes; else the published ones do.
estimate() {
    local corpus=(--tokens 117900000) model=(--vocab 50257 --dim "$3" --base_parameters "$4")
    if [ -e "$windows/dstore_summary.json" ]; then corpus=(--dataset_name "$windows"); fi
    if [ -e "$windows/dstore_summary.json" ] || [ -e "$2/config.json" ]; then model=(--model_name_or_path "$2"); fi
    # What is told to be too large here stops nothing.
    run "estimate for the $1" "$PYTHON" -m knn_utils.preflight "${corpus[@]}" "${model[@]}" --k "${K:-1024}" \
        --probe "${PROBE:-32}" --ncentroids "${NCENTROIDS:-4096}" --code_size "${CODE_SIZE:-64}" \
        --index_factory "${INDEX_FACTORY:-}" --layers "${MEMORY_LAYERS:-54}" --num_train_epochs "$EPOCHS" \
        --device_tflops 100 --processes 1 || true
}
if [ "$TRAIN" = 1 ] || [ "${PLAN_ONLY:-0}" = 1 ]; then
    estimate teacher "$XL" 1600 1.558e9
    estimate student "$LARGE" 1280 0.774e9
    mkdir -p "$OUTPUT"
    echo "free disk: $(df -h "$OUTPUT" | awk 'END { print $4 }')"
fi
[ "${PLAN_ONLY:-0}" != 1 ] || exit 0

# 2. Text to token windows, 1024 tokens each, 512 apart.
if [ -z "${WINDOWS:-}" ]; then
    DATASET_CONFIG="${DATASET_CONFIG-wikitext-103-raw-v1}"
    options=()
    add_given --dataset_config_name DATASET_CONFIG
    once "windows" "$PYTHON" utils/preprocess_dataset.py \
        --dataset_name "${DATASET:-Salesforce/wikitext}" ${options[@]+"${options[@]}"} \
        --tokenizer_path "${TOKENIZER:-$LARGE_VANILLA}" --output_dir "$windows" --num_proc "${NUM_PROC:-4}"
fi

# 3. The base models on the test split.
base() {
    once "evaluate $1" "${LAUNCH[@]}" -m train_base --model_name_or_path "$2" --dataset_name "$windows" \
        --do_eval --eval_subset test --per_device_eval_batch_size "${BATCH_SIZE_EVAL:-8}" \
        --output_dir "$WORK/$1" --report_to none ${precision[@]+"${precision[@]}"}
}
[ -z "${SMALL_VANILLA:-}" ] || base small_vanilla "$SMALL_VANILLA"
[ -z "${SMALL:-}" ] || base small_finetuned "$SMALL"
base large_vanilla "$LARGE_VANILLA"
base large_finetuned "$LARGE"
base xl_finetuned "$XL"

# 4. The memory, from the larger model's neighbours and the smaller model's hidden states.
# Settings of the two scripts that are set here stand in their commands, so that a changed one makes the stage run again.
set_here() {
    local name
    settings=()
    for name in "$@"; do
        [ -z "${!name:-}" ] || settings+=("$name=${!name}")
    done
}
if [ "$TRAIN" = 1 ]; then
    set_here K PROBE KNN_TEMP NCENTROIDS CODE_SIZE INDEX_FACTORY NUM_KEYS_TO_ADD BATCH_SIZE_EVAL BATCH_SIZE_KNN \
        ACCELERATE_CONFIG TORCH_DTYPE
    once "kNN targets of the teacher" env ${settings[@]+"${settings[@]}"} MODEL_TO_SAVE="$XL" DATASET="$windows" SUBSET=train \
        DSTORE_DIR="$WORK/teacher" OUTPUT_DIR="$WORK/teacher_embed" OUTPUT_PATH="$WORK/targets" PYTHON="$PYTHON" \
        bash scripts/save_pipeline.sh
    once "datastore of the student" "${LAUNCH[@]}" -m train_base --model_name_or_path "$LARGE" \
        --dataset_name "$windows" --do_eval --eval_subset train --per_device_eval_batch_size "${BATCH_SIZE_EVAL:-16}" \
        --output_dir "$WORK/student_embed" --dstore_dir "$WORK/student" --save_knnlm_dstore --report_to none \
        ${precision[@]+"${precision[@]}"}
    student=$(find "$WORK/student" -maxdepth 1 -name 'dstore_*_train_*.arrow' -print -quit)
    set_here BASE_MODEL_NAME MEMORY_LAYERS LEARNING_RATE WARMUP_STEPS ALPHA BATCH_SIZE GRADIENT_ACCUMULATION_STEPS SEED \
        ACCELERATE_CONFIG TORCH_DTYPE
    once "train the memory" env ${settings[@]+"${settings[@]}"} MODEL="$LARGE" DATASET="$windows" KNN_SAVE_PATH="$WORK/targets" \
        DSTORE_PATH="$student" OUTPUT_DIR="$WORK/memory" EPOCHS="$EPOCHS" PYTHON="$PYTHON" \
        bash scripts/train_mlpmem_offline.sh
fi

# 5. Base and memory together, and the table.
once "evaluate large_memory" "$PYTHON" -m evaluate_joint --do_test --model_name_or_path "$LARGE" \
    --dataset_name "$windows" --dataset_split_name test --per_device_eval_batch_size "${BATCH_SIZE_EVAL:-8}" \
    --output_dir "$WORK/large_memory" --knn_temp "${KNN_TEMP_MEMORY:-1}" --lmbda "${LAMBDA:-0.25}" \
    --knn_generator_path "$MEMORY" --report_to none ${precision[@]+"${precision[@]}"}
run "table" "$PYTHON" -m downstream.reproduction --vanilla "$LARGE_VANILLA" --large "$LARGE" --xl "$XL" \
    --small_vanilla "${SMALL_VANILLA:-}" --small "${SMALL:-}" --memory "$MEMORY" --train "$TRAIN" \
    --standins "${STANDINS:-0}" --output_dir "$OUTPUT"
echo "The stages took $(seconds_of_stages) s."
