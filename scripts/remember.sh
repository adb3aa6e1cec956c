#!/usr/bin/env bash
# A small memory of your own documents: bash scripts/remember.sh NAME TEXT... [--also FILE...] [--questions FILE]
#
# TEXT: .txt and .md files, tables (.jsonl, .csv, .parquet with the column text), folders of them. Nothing of it is left out.
# --also: further texts, and tables with the columns question and answer: rewordings and question-answer pairs, which any
# language model can write, are what makes the memory answer in other words than the documents'. --questions: a table with
# question (or prompt) and answer; they are asked of base, memory, kNN-LM and RAG.
# First a memory is made and measured with a tenth of the documents held out for choosing lambda, and a tenth for the report;
# then the one that stays, of all documents, with the settings found. bash scripts/ask.sh "prompt" asks all that are there.
# Run it again and it continues where it stopped. Relative paths are from the repository's root. Environment variables:
#   MODEL           base model: folder or hub name            (default: SmolLM2-135M-Instruct, from PyPI)
#   OUTPUT          folder of all memories                    (default: results/memories)
#   CONTEXTS        what windows begin with                   (default: documents paragraphs sentences)
#   OTHER_WEIGHT    of web text and articles, for the gate    (default: 10)
#   LAYERS LEARNING_RATE ALPHA DROPOUT KNOWN_WEIGHT CAUTION DTYPE SEED  as in scripts/quickstart.sh
#   EPOCHS ROWS_PER_STEP                                      (default: 16, 320; from 50,000 rows on 6, 960)
# shellcheck source=scripts/stages.sh
. "$(dirname "${BASH_SOURCE[0]}")/stages.sh"

usage() {
    sed -n '2,3p' "${BASH_SOURCE[0]}" >&2
    exit 2
}
[ $# -ge 2 ] || usage
name="$1" texts=() also=() questions="" into=texts
shift
for word in "$@"; do
    case "$word" in
        --also) into=also ;;
        --questions) into=questions ;;
        --*) usage ;;
        *) case "$into" in texts) texts+=("$word") ;; also) also+=("$word") ;; questions) questions="$word" into=texts ;; esac ;;
    esac
done
[ "${#texts[@]}" -gt 0 ] || usage
if [ -n "$questions" ]; then install compare; else install ""; fi

: "${OUTPUT:=results/memories}" "${CONTEXTS:=documents paragraphs sentences}" "${SEED:=42}"
: "${KNOWN_WEIGHT:=1}" "${OTHER_WEIGHT:=10}" "${CAUTION:=0}" "${DROPOUT:=0}"
folder="$OUTPUT/$name"
if [ ! -d "$OUTPUT/embedded/other" ]; then
    run "get the default model and other text" python -m utils.embedded_default --output_dir "$OUTPUT/embedded"
fi
MODEL="${MODEL:-$OUTPUT/embedded/model}"
find_precision

# With other documents than before, the memory is made anew.
inputs="$(find "${texts[@]}" ${also[@]+"${also[@]}"} -type f -exec sha256sum {} + | sort | sha256sum)"
if [ -f "$folder/inputs" ] && [ "$(cat "$folder/inputs")" != "$inputs" ]; then
    echo "the documents have changed: the memory is made anew"
    rm -rf "$folder/measured" "$folder/all"
fi
mkdir -p "$folder"
echo "$inputs" >"$folder/inputs"

# text FOLDER [flags]: the documents, in several contexts.
text() {
    # shellcheck disable=SC2086
    once "text" python -m utils.documents --texts "${texts[@]}" ${also[@]+--also "${also[@]}"} --tokenizer_path "$MODEL" \
        --output_dir "$1" --contexts $CONTEXTS --seed "$SEED" "${@:2}"
}

# sizes: fewer and larger steps, and an inexact index, for many rows; the second memory has the first one's epochs and steps.
sizes() {
    local counts rows windows
    counts="$(python -c 'import json, sys
train = json.load(open(sys.argv[1]))["train"]
print(train["dstore_size"], train["dataset_cnt_len"])' "$WORK/windows/dstore_summary.json")"
    rows="${counts% *}" windows="${counts#* }"
    if [ "$rows" -lt 50000 ]; then
        : "${EPOCHS:=16}" "${ROWS_PER_STEP:=320}"
        INDEX_FACTORY=Flat
    else
        : "${EPOCHS:=6}" "${ROWS_PER_STEP:=960}"
        INDEX_FACTORY=IVF512,Flat
    fi
    WINDOWS_PER_STEP=$(((ROWS_PER_STEP * windows + rows / 2) / rows)) # rounded
    [ "$WINDOWS_PER_STEP" -gt 0 ] || WINDOWS_PER_STEP=1
}

# 1. A memory of four fifths of the documents, and what it does to text that it has not seen.
WORK="$folder/measured" DONE="$folder/measured/done"
text "$WORK/text" --held_out 0.1
windows "$WORK/text"
sizes
embed train validation
index
# shellcheck disable=SC2086
knnlm validation --lmbda $LAMBDAS adaptive --knn_temp 1 2 4 8 16 32
targets --choose_on "$WORK/knnlm_validation/results.json"
memory --validation_split_name none
# Web text and encyclopedia articles: some for the gate, others for the report.
once "other text" python utils/preprocess_dataset.py --dataset_name "$OUTPUT/embedded/other" --tokenizer_path "$MODEL" \
    --output_dir "$WORK/other" --block_size "$BLOCK_SIZE" --stride "$BLOCK_SIZE" --by_document
gate --other_dataset_name "$WORK/other" --other_weight "$OTHER_WEIGHT" --known_windows 256
# shellcheck disable=SC2086
joint validation --lmbda $LAMBDAS adaptive --torch_dtype "$dtype"
joint test --lmbda adaptive --choose_on "$WORK/joint_validation/results.json" --torch_dtype "$dtype"
once "joint other" python -m evaluate_joint --do_test --model_name_or_path "$MODEL" \
    --knn_generator_path "$WORK/memory/epoch_$EPOCHS" --dataset_name "$WORK/other" --dataset_split_name test \
    --max_eval_samples 16 --lmbda adaptive --choose_on "$WORK/joint_validation/results.json" --torch_dtype "$dtype" \
    --output_dir "$WORK/joint_other"
measured="$WORK"

# 2. The memory of all documents, with the same settings and the same gate.
WORK="$folder/all" DONE="$folder/all/done"
text "$WORK/text"
windows "$WORK/text"
sizes
embed train
index
targets --choose_on "$measured/knnlm_validation/results.json"
memory --validation_split_name none
cp "$measured/memory/epoch_$EPOCHS"/gate.safetensors* "$WORK/memory/epoch_$EPOCHS/"
run "report" python -m downstream.report remember --work "$measured" --memory "$WORK/memory/epoch_$EPOCHS" \
    --output_dir "$folder" --seconds "$(($(DONE="$measured/done" seconds_of_stages) + $(seconds_of_stages)))"
lambda="$(python -c 'import json, sys; print(json.load(open(sys.argv[1]))["lambda"])' "$folder/results.json")"

# 3. The user's questions.
if [ -n "$questions" ]; then
    once "questions" python -m downstream.ask --model_name_or_path "$MODEL" --knn_generator_path "$WORK/memory/epoch_$EPOCHS" \
        --questions "$questions" --lmbda "$lambda" --documents "$WORK/text/documents.jsonl" --dstore_path "$(dstore train)" \
        --index_path "$WORK/dstore/train.index" --knn_results "$measured/knnlm_validation/results.json" \
        --torch_dtype "$dtype" --output_dir "$folder/questions"
fi
echo "ask it: bash scripts/ask.sh \"prompt\""
