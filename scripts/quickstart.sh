#!/usr/bin/env bash
# From text to a memory that lowers perplexity, on one machine: bash scripts/quickstart.sh
#
# Run it again and it continues where it stopped. Every setting is an environment variable:
#   MODEL           base model: folder or hub name            (default: SmolLM2-135M-Instruct, from PyPI)
#   TEXT            text: .jsonl, .csv, .parquet, folder or hub name  (default: Wikipedia articles, from PyPI)
#   OUTPUT          folder of everything                      (default: results/quickstart)
#   MAX_DOCUMENTS MAX_CHARACTERS MIN_CHARACTERS  use at most so many documents; of each, the paragraphs that begin within so
#                   many characters; none that is shorter     (default: 320, 1200 and 500 for the default text, else all)
#   SIZE            full: all articles of the default text
#   DTYPE           float32, bfloat16 or auto                 (default: auto, the faster one on this machine)
#   LAYERS EPOCHS LEARNING_RATE ALPHA DROPOUT WINDOWS_PER_STEP  the memory and its training
#   OWN_HEAD=1      the memory has a head of its own          (default: the base's)
#   SAMPLED         tokens sampled for the loss, 0 for the whole vocabulary  (default: 4096)
#   KNOWN_WEIGHT    gate: weight of training text; more recall, higher perplexity on new text  (default: 0.05)
#   CAUTION         gate: weight of staying at the base outside the domain of the text         (default: 1)
#   K PROBE         neighbours of a position, inverted lists searched  (default: 256, 8)
#   INDEX_FACTORY   kind of index, a FAISS factory string     (default: IVF512,Flat)
#   BLOCK_SIZE      tokens of a window                        (default: 512)
#   SEED            split of the documents, initialization and order of training (default: 42)
#   FINETUNE=1      fine-tune the base first, as the paper does: on 480 documents, results in OUTPUT/finetuned
#   FINETUNE_EPOCHS FINETUNE_LEARNING_RATE                    (default: 1, 1e-4)
#   PYTHON          makes .venv, unless an environment is active       (default: python3)
# shellcheck source=scripts/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
install ""

WORK="${OUTPUT:=results/quickstart}/work" embedded="${OUTPUT}/work/embedded"
DONE="$WORK/done"
: "${BLOCK_SIZE:=512}" "${SEED:=42}" "${K:=256}" "${PROBE:=8}" "${FINETUNE:=0}"
# The paper trains from random weights at learning rate 5e-4 and alpha 0.5, with one lambda. With this little text it is
# better to start from the base; nine epochs at a small alpha make the memory learn the text, dropout keeps it from being
# overconfident elsewhere, and a gate switches it off where it does not know (docs/remember.md has the experiments).
documents=320
if [ "$FINETUNE" = 1 ]; then  # a base that knows the domain leaves less to gain: more text, more epochs
    documents=480
    : "${EPOCHS:=12}" "${DROPOUT:=0.4}" "${KNOWN_WEIGHT:=0.005}" "${CAUTION:=0.3}"
fi
: "${LAYERS:=8}" "${EPOCHS:=9}" "${KNOWN_WEIGHT:=0.05}" "${LEARNING_RATE:=6e-4}" "${ALPHA:=0.2}" "${WINDOWS_PER_STEP:=3}"
: "${DROPOUT:=0.2}" "${CAUTION:=1}"
LAMBDAS="0.02 0.05 0.1 0.15 0.2 0.25 0.3 0.35 0.4 0.45 0.5 0.55 0.6 0.65 0.7 0.75 0.8 0.85 0.9"

# 1. A model, a text and a precision.
if [ -z "${MODEL:-}" ] || [ -z "${TEXT:-}" ]; then
    once "get model and text" python -m utils.embedded_default --output_dir "$embedded"
fi
if [ -z "${TEXT:-}" ]; then
    [ "${SIZE:-}" = full ] || : "${MAX_DOCUMENTS:=$documents}"
    : "${MAX_CHARACTERS:=1200}" "${MIN_CHARACTERS:=500}"
fi
limits=(${MAX_DOCUMENTS:+--max_documents "$MAX_DOCUMENTS"} ${MAX_CHARACTERS:+--max_document_characters "$MAX_CHARACTERS"}
    ${MIN_CHARACTERS:+--min_document_characters "$MIN_CHARACTERS"})
MODEL="${MODEL:-$embedded/model}" TEXT="${TEXT:-$embedded/wiki.jsonl}"
dtype="$(python -c 'import sys; from utils.loading import BaseArguments
print(str(BaseArguments(torch_dtype=sys.argv[1]).dtype()).split(".")[-1])' "${DTYPE:-auto}")"
case "$dtype" in bfloat16) mixed=bf16 half=(--bf16) ;; *) mixed=no half=() ;; esac
echo "precision: $dtype"
if [ "$FINETUNE" = 1 ]; then  # all that follows is made for the fine-tuned base, in folders of its own
    OUTPUT="$OUTPUT/finetuned" WORK="$WORK/finetuned" DONE="$DONE/finetuned"
fi

# 2. Text to token windows, split by document. Each document begins a window, as it will begin a prompt.
once "windows" python utils/preprocess_dataset.py \
    --dataset_name "$TEXT" --tokenizer_path "$MODEL" --output_dir "$WORK/windows" \
    --block_size "$BLOCK_SIZE" --stride "$BLOCK_SIZE" --by_document ${limits[@]+"${limits[@]}"} \
    --validation_fraction 0.1 --test_fraction 0.1 --seed "$SEED"

if [ "$FINETUNE" = 1 ]; then
    once "base" python -m train_base --do_eval --model_name_or_path "$MODEL" --dataset_name "$WORK/windows" \
        --eval_subset test --per_device_eval_batch_size 8 --torch_dtype "$dtype" --output_dir "$WORK/untuned" --report_to none
    [ "$mixed" = no ] || python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || half+=(--use_cpu)
    once "fine-tune" python -m train_base --do_train --model_name_or_path "$MODEL" --dataset_name "$WORK/windows" \
        --output_dir "$WORK/model" --num_train_epochs "${FINETUNE_EPOCHS:-1}" \
        --learning_rate "${FINETUNE_LEARNING_RATE:-1e-4}" --per_device_train_batch_size 2 --seed "$SEED" \
        --save_strategy steps --save_steps 20 --save_total_limit 1 --logging_steps 10 --disable_tqdm True \
        --report_to none ${half[@]+"${half[@]}"}
    rm -rf "$WORK"/model/checkpoint-*
    MODEL="$WORK/model"
fi

# 3. Windows to hidden states: the datastore. For the held-out splits the base's log-probabilities are kept too, so that
#    later stages read them instead of running the base again.
embed() {
    once "datastore $1" python -m train_base --model_name_or_path "$MODEL" --dataset_name "$WORK/windows" \
        --do_eval --eval_subset "$1" --per_device_eval_batch_size 8 --torch_dtype "$dtype" \
        --save_knnlm_dstore --dstore_dir "$WORK/dstore" --output_dir "$WORK/embed_$1" --report_to none "${@:2}"
}
embed train
embed validation --save_logprob
embed test --save_logprob
dstore() { find "$WORK/dstore" -maxdepth 1 -name "dstore_*_$1_*.arrow" -print -quit; }
train_dstore=$(dstore train) validation_dstore=$(dstore validation) test_dstore=$(dstore test)

# 4. An index over the training positions.
index="$WORK/dstore/train.index"
once "index" python -m knn_utils.build_index --dstore_path "$train_dstore" --index_path "$index" \
    --index_factory "${INDEX_FACTORY:-IVF512,Flat}"

# 5. The kNN-LM, the retriever that the memory imitates: with one lambda, and with a lambda by the distance of the nearest
#    neighbour. Settings are chosen on validation text and used on test text.
knnlm() {
    once "kNN-LM $1" python -m train_base --do_eval --knn --dataset_name "$WORK/windows" --eval_subset "$1" \
        --dstore_path "$2" --val_file "$train_dstore" --index_file "$index" --k "$K" --probe "$PROBE" \
        --output_dir "$WORK/knnlm_$1" --report_to none "${@:3}"
}
# shellcheck disable=SC2086
knnlm validation "$validation_dstore" --lmbda $LAMBDAS adaptive --knn_temp 1 2 4 8 16 32

# 6. The training targets: the kNN distribution of every training position, at the temperature at which the kNN-LM is best
#    on validation text (the paper's 16 is for its own models).
once "kNN targets" python -m knn_utils.saveKNNMulti --dstore_path "$train_dstore" --index_path "$index" \
    --output_path "$WORK/targets" --k "$K" --probe "$PROBE" --batch_size 4096 --ignore_first True \
    --choose_on "$WORK/knnlm_validation/results.json"

# 7. The memory: without a head of its own, in bfloat16 where that is the faster precision, and with a loss over a sampled part
#    of the vocabulary, which makes a step a third faster.
tied=(--sampled_vocabulary "${SAMPLED:-4096}")
[ "${OWN_HEAD:-0}" = 1 ] || tied+=(--tie_head)
[ "$mixed" = no ] || tied+=(--save_dtype bfloat16)
once "train the memory" python -m train_mlpmem_offline --model_name_or_path "$MODEL" --dataset_name "$WORK/windows" \
    --knn_save_path "$WORK/targets" --knn_dstore_path "$train_dstore" --validation_dstore_path "$validation_dstore" \
    --output_dir "$WORK/memory" --init_from_base "${tied[@]}" --memory_layers "$LAYERS" --num_train_epochs "$EPOCHS" \
    --learning_rate "$LEARNING_RATE" --alpha "$ALPHA" --memory_dropout "$DROPOUT" \
    --per_device_train_batch_size "$WINDOWS_PER_STEP" --lr_scheduler_type linear --num_warmup_steps 10 \
    --logging_steps 10 --micro_batch_rows 2048 --max_eval_samples 16 --seed "$SEED" --mixed_precision "$mixed"
memory="$WORK/memory/epoch_$EPOCHS"

# 8. Perplexity of base + memory: one lambda and temperature chosen on validation text, and the gate, which gives each token
#    its own lambda; it is trained on validation text and some training text.
joint() {
    once "joint $1" python -m evaluate_joint --do_test --model_name_or_path "$MODEL" --knn_generator_path "$memory" \
        --dataset_name "$WORK/windows" --dataset_split_name "$1" --output_dir "$WORK/joint_$1" --report_to none "${@:2}"
}
# shellcheck disable=SC2086
joint validation --dstore_path "$validation_dstore" --lmbda $LAMBDAS --memory_temp 0.7 0.85 1 1.2 1.5 2
once "gate" python -m training.gate --model_name_or_path "$MODEL" --knn_generator_path "$memory" \
    --dataset_name "$WORK/windows" --known_weight "$KNOWN_WEIGHT" --caution "$CAUTION" --torch_dtype "$dtype" --seed "$SEED"
joint test --lmbda adaptive --choose_on "$WORK/joint_validation/results.json" --torch_dtype "$dtype"
knnlm test "$test_dstore" --choose_on "$WORK/knnlm_validation/results.json"

# 9. Recall: beginnings of the training articles, continued.
once "recall" python -m downstream.recall --model_name_or_path "$MODEL" --knn_generator_path "$memory" \
    --articles "$WORK/windows/raw/train.jsonl" --lmbda adaptive --choose_on "$WORK/joint_validation/results.json" \
    --answer_words 1 --max_cases 300 --torch_dtype "$dtype" --output_dir "$WORK/recall"

# 10. The table.
run "report" python -m downstream.report quickstart --work "$WORK" --output_dir "$OUTPUT" --seconds "$(seconds_of_stages)"
