#!/usr/bin/env bash
# From text to a memory that lowers perplexity, on one machine: bash scripts/quickstart.sh
#
# Run it again and it continues where it stopped. Every setting is an environment variable:
#   MODEL           base model: folder or hub name            (default: SmolLM2-135M-Instruct, from PyPI)
#   TEXT            text: .txt, .jsonl, .csv, .parquet, folder or hub  (default: Wikipedia articles, from PyPI)
#   OUTPUT          folder of everything                      (default: results/quickstart)
#   MAX_DOCUMENTS   size: so many articles at most            (default: 320 of the default text's, all of another's)
#   MAX_CHARACTERS  size: paragraphs that begin within so many characters of an article  (default: 1200)
#   DTYPE           float32, bfloat16 or auto                 (default: auto, the faster of the two here)
#   SIZE            full: all of the default text's articles, whatever time it takes
#   LAYERS EPOCHS LEARNING_RATE ALPHA DROPOUT WINDOWS_PER_STEP  the memory and its training
#   KNOWN_WEIGHT    weight of known text when the gate is trained: more recall, higher perplexity  (default: 0.05)
#   CAUTION         weight of keeping the memory out of text of another kind (default: 1)
#   K PROBE         neighbours of a position, inverted lists searched  (default: 256, 8)
#   INDEX_FACTORY   kind of index, a FAISS factory string     (default: IVF512,Flat)
#   BY_DOCUMENT=1   each document of TEXT begins a window  (the default text's articles do)
#   MIN_CHARACTERS  leave out shorter articles of the default text     (default: 500)
#   BLOCK_SIZE      tokens of a window                        (default: 512)
#   SEED            split of the articles, start and order of training (default: 42)
#   FINETUNE=1      fine-tune the base first, as the paper does: on 480 documents, with other settings of the memory, in OUTPUT/finetuned
#   FINETUNE_EPOCHS FINETUNE_LEARNING_RATE                    (default: 1, 1e-4)
#   PYTHON          makes .venv, unless an environment is active       (default: python3)
# shellcheck source=scripts/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
install ""

WORK="${OUTPUT:=results/quickstart}/work"
DONE="$WORK/done"
embedded="$WORK/embedded"
: "${BLOCK_SIZE:=512}" "${MAX_CHARACTERS:=1200}" "${SEED:=42}" "${K:=256}" "${PROBE:=8}"
# With little data a start near the base lowers the perplexity of unseen text. Six epochs at a small alpha make the
# memory learn its corpus, dropout keeps it from being too sure elsewhere, and a gate keeps it silent where it does not
# know (docs/remember.md has what was tried). The paper trains from random weights at 5e-4 and alpha 0.5, with one lambda.
# A base that has learnt the kind of text by itself leaves less to gain: what is left takes more text and more epochs.
documents=320
if [ "${FINETUNE:=0}" = 1 ]; then
    documents=480
    : "${EPOCHS:=12}" "${DROPOUT:=0.4}" "${KNOWN_WEIGHT:=0.005}" "${CAUTION:=0.3}"
fi
: "${LAYERS:=4}" "${EPOCHS:=6}" "${KNOWN_WEIGHT:=0.05}" "${LEARNING_RATE:=6e-4}" "${ALPHA:=0.2}" "${WINDOWS_PER_STEP:=3}"
: "${DROPOUT:=0.2}" "${CAUTION:=1}"
LAMBDAS="0.02 0.05 0.1 0.15 0.2 0.25 0.3 0.35 0.4 0.45 0.5 0.55 0.6 0.65 0.7 0.75 0.8 0.85 0.9"
mkdir -p "$DONE"

# 1. A model and a text.
if [ -z "${MODEL:-}" ] || [ -z "${TEXT:-}" ]; then
    once "get model and text" python -m utils.embedded_default --output_dir "$embedded"
fi
cut=--group_rows
text_options=()
if [ -n "${TEXT:-}" ] || [ "${SIZE:-}" = full ]; then documents=1000000; fi
if [ -z "${TEXT:-}" ]; then
    cut=--by_document
    text_options=(--document_separator '\n?</doc>\n*|<doc [^>]*>\n' --min_document_characters "${MIN_CHARACTERS:-500}")
fi
MODEL="${MODEL:-$embedded/model}"
TEXT="${TEXT:-$embedded/wiki.txt}"

# The precision is chosen once, so that an interrupted run continues in the same one.
if [ ! -f "$WORK/dtype" ]; then
    python -m utils.precision "${DTYPE:-auto}" >"$WORK/dtype.tmp"
    mv "$WORK/dtype.tmp" "$WORK/dtype"
fi
dtype=$(cat "$WORK/dtype")
case "$dtype" in bfloat16) mixed=bf16 ;; *) mixed=no ;; esac
echo "precision: $dtype"

# With FINETUNE=1 all that follows is made for the fine-tuned base, in a folder of its own.
if [ "$FINETUNE" = 1 ]; then
    OUTPUT="$OUTPUT/finetuned" WORK="$WORK/finetuned" DONE="$DONE/finetuned"
    mkdir -p "$WORK" "$DONE"
fi

# 2. Text to token windows, split by article; no token is left out. With documents each one begins a window of its own:
#    it is learnt as a prompt will find it.
[ "${BY_DOCUMENT:-0}" = 0 ] || cut=--by_document
once "windows" python utils/preprocess_dataset.py \
    --dataset_name "$TEXT" --tokenizer_path "$MODEL" --output_dir "$WORK/windows" \
    --block_size "$BLOCK_SIZE" --stride "$BLOCK_SIZE" $cut --max_documents "${MAX_DOCUMENTS:-$documents}" \
    --max_document_characters "$MAX_CHARACTERS" \
    --validation_fraction 0.1 --test_fraction 0.1 --seed "$SEED" "${text_options[@]}"

# With FINETUNE=1 the base learns the text itself first: only then is it seen what a memory adds to a model of this text.
# The base before that is scored for the table.
if [ "$FINETUNE" = 1 ]; then
    once "base" python -m train_base --do_eval --model_name_or_path "$MODEL" --dataset_name "$WORK/windows" \
        --eval_subset test --per_device_eval_batch_size 8 --torch_dtype "$dtype" --output_dir "$WORK/untuned" --report_to none
    half=()
    [ "$mixed" = no ] || half=(--bf16)
    [ "$mixed" = no ] || [ "$(count_cards)" -gt 0 ] || half+=(--use_cpu)
    once "fine-tune" python -m train_base --do_train --model_name_or_path "$MODEL" --dataset_name "$WORK/windows" \
        --output_dir "$WORK/model" --num_train_epochs "${FINETUNE_EPOCHS:-1}" \
        --learning_rate "${FINETUNE_LEARNING_RATE:-1e-4}" --per_device_train_batch_size 2 --seed "$SEED" \
        --save_strategy steps --save_steps 20 --save_total_limit 1 --logging_steps 10 --disable_tqdm True \
        --report_to none ${half[@]+"${half[@]}"}
    rm -rf "$WORK"/model/checkpoint-*
    MODEL="$WORK/model"
fi

# 3. Windows to hidden states: the datastore. Of the held-out splits the base's log-probabilities are kept too, so
#    that everything after this reads them instead of running the base again.
embed() {
    once "datastore $1" python -m train_base --model_name_or_path "$MODEL" --dataset_name "$WORK/windows" \
        --do_eval --eval_subset "$1" --per_device_eval_batch_size 8 --torch_dtype "$dtype" \
        --save_knnlm_dstore --dstore_dir "$WORK/dstore" --output_dir "$WORK/embed_$1" --report_to none "${@:2}"
}
embed train
embed validation --save_logprob
embed test --save_logprob
dstore() { find "$WORK/dstore" -maxdepth 1 -name "dstore_*_$1_*.arrow" -print -quit; }
train_dstore=$(dstore train)
validation_dstore=$(dstore validation)
test_dstore=$(dstore test)

# 4. An index over the training positions.
index="$WORK/dstore/train.index"
once "index" python -m knn_utils.build_index --dstore_path "$train_dstore" --index_path "$index" \
    --index_factory "${INDEX_FACTORY:-IVF512,Flat}"

# 5. The kNN-LM, the retriever that the memory is to imitate, at its best temperature and lambda, and with a lambda that
#    follows the distance of the nearest neighbour. A choice made on validation is scored on test as it is.
knnlm() {
    once "kNN-LM $1" python -m train_base --do_eval --knn --dataset_name "$WORK/windows" --eval_subset "$1" \
        --dstore_path "$2" --val_file "$train_dstore" --index_file "$index" --k "$K" --probe "$PROBE" \
        --output_dir "$WORK/knnlm_$1" --report_to none "${@:3}"
}
# shellcheck disable=SC2086
knnlm validation "$validation_dstore" --lmbda $LAMBDAS adaptive --knn_temp 1 2 4 8 16 32

# 6. What the memory is to learn: the kNN distribution of every training position. The temperature is the one at
#    which the kNN-LM is best on the validation articles (the paper's 16 is for its own model).
once "kNN targets" python -m knn_utils.saveKNNMulti --dstore_path "$train_dstore" --index_path "$index" \
    --output_path "$WORK/targets" --k "$K" --probe "$PROBE" --batch_size 4096 --ignore_first True \
    --choose_on "$WORK/knnlm_validation/results.json"

# 7. The memory.
once "train the memory" python -m train_mlpmem_offline --model_name_or_path "$MODEL" --dataset_name "$WORK/windows" \
    --knn_save_path "$WORK/targets" --knn_dstore_path "$train_dstore" --validation_dstore_path "$validation_dstore" \
    --output_dir "$WORK/memory" --init_from_base --memory_layers "$LAYERS" --num_train_epochs "$EPOCHS" \
    --learning_rate "$LEARNING_RATE" --alpha "$ALPHA" --memory_dropout "$DROPOUT" --per_device_train_batch_size "$WINDOWS_PER_STEP" \
    --lr_scheduler_type linear --num_warmup_steps 10 --micro_batch_rows 2048 --max_eval_samples 16 \
    --seed "$SEED" --mixed_precision "$mixed"
memory="$WORK/memory/epoch_$EPOCHS"

# 8. Perplexity: lambda and temperature are chosen on the validation articles, reported on the test articles; and the
#    gate, which gives each token its own lambda, is trained on the validation articles and on known text.
joint() {
    once "joint $1" python -m evaluate_joint --do_test --model_name_or_path "$MODEL" --knn_generator_path "$memory" \
        --dataset_name "$WORK/windows" --dataset_split_name "$1" --output_dir "$WORK/joint_$1" --report_to none "${@:2}"
}
# shellcheck disable=SC2086
joint validation --dstore_path "$validation_dstore" --lmbda $LAMBDAS --knn_temp 0.7 0.85 1 1.2 1.5 2
once "gate" python -m training.gate --model_name_or_path "$MODEL" --knn_generator_path "$memory" \
    --dataset_name "$WORK/windows" --known_weight "$KNOWN_WEIGHT" --caution "$CAUTION" --torch_dtype "$dtype" --seed "$SEED"
joint test --lmbda adaptive --choose_on "$WORK/joint_validation/results.json" --torch_dtype "$dtype"
knnlm test "$test_dstore" --choose_on "$WORK/knnlm_validation/results.json"

# 9. What was remembered of the trained articles (a text that comes with splits of its own has no list of them).
articles="$WORK/windows/raw/train.jsonl"
[ -f "$articles" ] || articles=/dev/null
once "recall" python -m downstream.recall --model_name_or_path "$MODEL" --knn_generator_path "$memory" \
    --articles "$articles" --lmbda adaptive --choose_on "$WORK/joint_validation/results.json" \
    --answer_words 1 --max_cases 300 --torch_dtype "$dtype" --output_dir "$WORK/recall"

# 10. The table.
run "report" python -m downstream.report --work "$WORK" --output_dir "$OUTPUT" --seconds "$(seconds_of_stages)"
