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
# shellcheck source=scripts/stages.sh
. "$(dirname "${BASH_SOURCE[0]}")/stages.sh"
install ""

WORK="${OUTPUT:=results/quickstart}/work" embedded="${OUTPUT}/work/embedded"
DONE="$WORK/done"
: "${FINETUNE:=0}" "${SEED:=42}" "${EPOCHS:=12}"
documents=320
if [ "$FINETUNE" = 1 ]; then  # a base that knows the domain leaves less to gain: more text
    documents=480
    : "${DROPOUT:=0.4}" "${KNOWN_WEIGHT:=0.005}" "${CAUTION:=0.3}"
fi

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
find_precision
if [ "$FINETUNE" = 1 ]; then  # all that follows is made for the fine-tuned base, in folders of its own
    OUTPUT="$OUTPUT/finetuned" WORK="$WORK/finetuned" DONE="$DONE/finetuned"
fi

# 2. Text to token windows, split by document. Each document begins a window, as it will begin a prompt.
windows "$TEXT" ${limits[@]+"${limits[@]}"} --validation_fraction 0.1 --test_fraction 0.1

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
embed train validation test

# 4. An index over the training positions.
index

# 5. The kNN-LM, the retriever that the memory imitates: with one lambda, and with a lambda by the distance of the nearest
#    neighbour. Settings are chosen on validation text and used on test text.
# shellcheck disable=SC2086
knnlm validation --lmbda $LAMBDAS adaptive --knn_temp 1 2 4 8 16 32

# 6. The training targets: the kNN distribution of every training position, at the temperature at which the kNN-LM is best
#    on validation text (the paper's 16 is for its own models).
targets --choose_on "$WORK/knnlm_validation/results.json"

# 7. The memory.
memory --validation_dstore_path "$(dstore validation)" --max_eval_samples 16

# 8. Perplexity of base + memory: one lambda and temperature chosen on validation text, and the gate, which gives each token
#    its own lambda; it is trained on validation text and some training text.
# shellcheck disable=SC2086
joint validation --dstore_path "$(dstore validation)" --lmbda $LAMBDAS --memory_temp 0.7 0.85 1 1.2 1.5 2
gate --steps 300
joint test --lmbda adaptive --choose_on "$WORK/joint_validation/results.json" --torch_dtype "$dtype"
knnlm test --choose_on "$WORK/knnlm_validation/results.json"

# 9. Recall: beginnings of the training articles, continued.
once "recall" python -m downstream.recall --model_name_or_path "$MODEL" --knn_generator_path "$WORK/memory/epoch_$EPOCHS" \
    --articles "$WORK/windows/raw/train.jsonl" --lmbda adaptive --choose_on "$WORK/joint_validation/results.json" \
    --answer_words 1 --max_cases 300 --torch_dtype "$dtype" --output_dir "$WORK/recall"

# 10. The table.
run "report" python -m downstream.report quickstart --work "$WORK" --output_dir "$OUTPUT" --seconds "$(seconds_of_stages)"
