#!/usr/bin/env bash
# The paper's table in small, from text to table, without a hub or a GPU: bash scripts/standins.sh
#
# Tiny GPT-2 models of three sizes take the places of the real ones. Vanilla models are trained from scratch on web text,
# fine-tuned ones by continuing on Wikipedia articles; then scripts/reproduce_wikitext103.sh runs with TRAIN=1 as it would
# with the real models: XL is the teacher of the kNN targets, large the memory's base, and small shows in two further rows
# what size alone brings. Run it again and it continues where it stopped. Settings (environment variables; relative paths
# are from the repository's root):
#   OUTPUT                  folder of everything                   (default: results/standins)
#   WEB_TEXT WIKI_TEXT      text files                             (default: from PyPI)
#   VANILLA_EPOCHS TUNED_EPOCHS MAX_CHARACTERS SEED                training of the stand-ins
#   INDEX_FACTORY PROBE K KNN_TEMP MEMORY_LAYERS EPOCHS LEARNING_RATE WARMUP_STEPS BATCH_SIZE      the memory
# shellcheck source=scripts/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
find_python

OUTPUT="${OUTPUT:-results/standins}"
WORK="$OUTPUT/standins"
DONE="$OUTPUT/work/done"  # shared with the chain at the end, whose stages rest on these
SEED="${SEED:-42}"
BLOCK_SIZE=128

# 1. Text of two kinds, and one tokenizer for all models.
if [ -z "${WEB_TEXT:-}" ] || [ -z "${WIKI_TEXT:-}" ]; then
    once "get text" "$PYTHON" -m utils.embedded_default --output_dir "$WORK/embedded"
fi
WEB_TEXT="${WEB_TEXT:-$WORK/embedded/web.txt}"
WIKI_TEXT="${WIKI_TEXT:-$WORK/embedded/wiki.txt}"
once "tokenizer and sizes" "$PYTHON" -m downstream.standins --texts "$WEB_TEXT" "$WIKI_TEXT" \
    --output_dir "$WORK/configs" --positions "$BLOCK_SIZE"

once "windows of web text" "$PYTHON" utils/preprocess_dataset.py --dataset_name "$WEB_TEXT" \
    --tokenizer_path "$WORK/configs/large" --output_dir "$WORK/windows-web" \
    --block_size "$BLOCK_SIZE" --stride "$BLOCK_SIZE"
once "windows of articles" "$PYTHON" utils/preprocess_dataset.py --dataset_name "$WIKI_TEXT" \
    --tokenizer_path "$WORK/configs/large" --output_dir "$WORK/windows-wiki" \
    --block_size "$BLOCK_SIZE" --stride "$BLOCK_SIZE" \
    --document_separator '\n?</doc>\n*|<doc [^>]*>\n' --min_document_characters 60 \
    --max_document_characters "${MAX_CHARACTERS:-2000}" --validation_fraction 0.1 --test_fraction 0.1 --seed "$SEED"

# 2. Three sizes, each from scratch on web text, then on the articles until the held-out loss no longer falls.
tune() {
    once "train $1" "$PYTHON" -m train_base --do_train --model_name_or_path "$2" --dataset_name "$3" \
        --output_dir "$WORK/$1" --num_train_epochs "$4" --learning_rate "$5" --lr_scheduler_type cosine \
        --warmup_steps 20 --per_device_train_batch_size 16 --per_device_eval_batch_size 16 --save_strategy epoch \
        --save_total_limit 2 --logging_steps 50 --seed "$SEED" --disable_tqdm True --report_to none "${@:6}"
}
for size in small large xl; do
    tune "$size-vanilla" "$WORK/configs/$size" "$WORK/windows-web" "${VANILLA_EPOCHS:-6}" 2e-3 --from_scratch
    tune "$size-finetuned" "$WORK/$size-vanilla" "$WORK/windows-wiki" "${TUNED_EPOCHS:-6}" 2e-3 --patience 2
done

# 3. The chain that makes the paper's table. The paper's sizes of index, memory and schedule are for 100 million tokens.
export OUTPUT TRAIN=1 STANDINS=1 PYTHON
export SMALL_VANILLA="$WORK/small-vanilla" SMALL="$WORK/small-finetuned"
export LARGE_VANILLA="$WORK/large-vanilla" LARGE="$WORK/large-finetuned" XL="$WORK/xl-finetuned"
export WINDOWS="$WORK/windows-wiki"
export INDEX_FACTORY="${INDEX_FACTORY:-IVF256,Flat}" PROBE="${PROBE:-8}" K="${K:-128}" KNN_TEMP="${KNN_TEMP:-16}"
export MEMORY_LAYERS="${MEMORY_LAYERS:-4}" EPOCHS="${EPOCHS:-6}" LEARNING_RATE="${LEARNING_RATE:-1e-3}"
export WARMUP_STEPS="${WARMUP_STEPS:-20}" BATCH_SIZE="${BATCH_SIZE:-16}" SEED
bash scripts/reproduce_wikitext103.sh
