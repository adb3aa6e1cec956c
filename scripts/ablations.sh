#!/usr/bin/env bash
# One setting of the method, several values: a memory for each, its perplexity, a table and a plot.
#   bash scripts/ablations.sh alpha|temperature|layers|layer_position|offline_online [VALUE...]
#     alpha            weight of KL(kNN || memory) in the loss       (default: 0 0.25 0.5 0.75 1)
#     temperature      of the kNN distributions                      (default: 1 2 4 16)
#     layers           of the memory                                 (default: 1 2 4 8)
#     layer_position   the decoder block whose MLP input is captured (default: -1 -6 -12 -20)
#     offline_online   hidden states from a datastore, or from the base while training
#
# What a setting does not change is made once for all ablations in OUTPUT; run it again and it continues where it stopped.
# It is small by default: 80 articles of the default text, minutes on two cores. Settings (environment variables;
# relative paths are from the repository's root):
#   OUTPUT                           folder of everything                  (default: results/ablations)
#   MODEL TEXT                       base model and text                   (default: SmolLM2-135M-Instruct, Wikipedia; PyPI)
#   WINDOWS                          an existing windows folder, in place of TEXT
#   MAX_DOCUMENTS MAX_CHARACTERS BLOCK_SIZE                                (default: 80, 1200, 512)
#   K PROBE INDEX_FACTORY KNN_TEMP   the kNN distributions                 (default: 256, 8, IVF64,Flat, 2)
#   LAYER_POSITION LAYERS            captured block, layers of the memory  (default: -1, 2)
#   ALPHA EPOCHS LEARNING_RATE WARMUP_STEPS WINDOWS_PER_STEP               (default: 0.5, 2, 1e-4, 0, 2)
#   INIT                             the memory's start; empty: random     (default: --init_from_base)
#   BATCH_SIZE_EVAL SEED TORCH_DTYPE ACCELERATE_CONFIG
# The paper's sizes: MODEL=Rubin-Wei/gpt2-large-finetuned-wikitext103 WINDOWS=dataset/wikitext-gpt2 K=1024 PROBE=32
# INDEX_FACTORY=IVF4096,PQ64 KNN_TEMP=16 LAYERS=54 EPOCHS=50 LEARNING_RATE=5e-4 WARMUP_STEPS=2000
# WINDOWS_PER_STEP=16 INIT=
# shellcheck source=scripts/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
find_python
find_launcher

case "${1:-}" in
    alpha) setting=ALPHA title="alpha" default="0 0.25 0.5 0.75 1" ;;
    temperature) setting=KNN_TEMP title="kNN temperature" default="1 2 4 16" ;;
    layers) setting=LAYERS title="layers of the memory" default="1 2 4 8" ;;
    layer_position) setting=LAYER_POSITION title="captured block" default="-1 -6 -12 -20" ;;
    offline_online) setting=KIND title="hidden states" default="offline online" ;;
    *) echo "usage: bash scripts/ablations.sh alpha|temperature|layers|layer_position|offline_online [VALUE...]" >&2 && exit 2 ;;
esac
name="$1"
shift
read -ra values <<<"${*:-$default}"

WORK="${OUTPUT:=results/ablations}/work"
DONE="$WORK/done"
: "${BLOCK_SIZE:=512}" "${K:=256}" "${PROBE:=8}" "${KNN_TEMP:=2}" "${LAYER_POSITION:=-1}" "${LAYERS:=2}" "${ALPHA:=0.5}"
: "${EPOCHS:=2}" "${BATCH_SIZE_EVAL:=4}" "${SEED:=42}" "${INIT=--init_from_base}"
LAMBDAS="0.05 0.1 0.15 0.2 0.25 0.3 0.35 0.4 0.45 0.5 0.55 0.6 0.65 0.7 0.75 0.8 0.85 0.9"
KIND=offline

# 1. A model, and a text in windows, split by document.
if [ -z "${MODEL:-}" ] || [ -z "${TEXT:-}${WINDOWS:-}" ]; then
    once "get model and text" "$PYTHON" -m utils.embedded_default --output_dir "$WORK/embedded"
fi
MODEL="${MODEL:-$WORK/embedded/model}"
if [ -z "${WINDOWS:-}" ]; then
    WINDOWS="$WORK/windows"
    once "windows" "$PYTHON" utils/preprocess_dataset.py --dataset_name "${TEXT:-$WORK/embedded/wiki.jsonl}" \
        --tokenizer_path "$MODEL" --output_dir "$WINDOWS" --block_size "$BLOCK_SIZE" --stride "$BLOCK_SIZE" --group_rows \
        --max_documents "${MAX_DOCUMENTS:-80}" --min_document_characters 500 \
        --max_document_characters "${MAX_CHARACTERS:-1200}" --validation_fraction 0.2 --test_fraction 0.2 --seed "$SEED"
fi
base=(--model_name_or_path "$MODEL" --dataset_name "$WINDOWS" --torch_dtype "${TORCH_DTYPE:-float32}")

for value in "${values[@]}"; do
    declare "$setting=$value"
    block=(--layer_position "$LAYER_POSITION") run="$WORK/$name/$value" store="$WORK/block$LAYER_POSITION"

    # 2. For a captured block and a temperature: hidden states of the three splits, index, and kNN targets.
    for split in train validation test; do
        scored=(--save_logprob)
        [ "$split" != train ] || scored=()
        once "datastore $split, block $LAYER_POSITION" "${LAUNCH[@]}" -m train_base "${base[@]}" "${block[@]}" --do_eval \
            --eval_subset "$split" --per_device_eval_batch_size "$BATCH_SIZE_EVAL" --save_knnlm_dstore \
            --dstore_dir "$store" --output_dir "$store/tmp" --report_to none ${scored[@]+"${scored[@]}"}
    done
    dstore() { find "$store" -maxdepth 1 -name "dstore_*_$1_*.arrow" -print -quit; }
    once "index, block $LAYER_POSITION" "$PYTHON" -m knn_utils.build_index --dstore_path "$(dstore train)" \
        --index_path "$store/train.index" --index_factory "${INDEX_FACTORY:-IVF64,Flat}"
    once "targets, block $LAYER_POSITION, temperature $KNN_TEMP" "${LAUNCH[@]}" -m knn_utils.saveKNNMulti \
        --dstore_path "$(dstore train)" --index_path "$store/train.index" --output_path "$store/targets_$KNN_TEMP" --k "$K" \
        --knn_temp "$KNN_TEMP" --probe "$PROBE" --ignore_first True ${ON_GPU[@]+"${ON_GPU[@]}"}

    # 3. The memory, and its score: lambda is chosen on the validation split and used on the test split.
    stored=(--knn_dstore_path "$(dstore train)")
    [ "$KIND" != online ] || stored=()
    once "train $name $value" "${LAUNCH[@]}" -m "train_mlpmem_$KIND" "${base[@]}" "${block[@]}" --output_dir "$run/memory" \
        --knn_save_path "$store/targets_$KNN_TEMP" --validation_dstore_path "$(dstore validation)" \
        --memory_layers "$LAYERS" --alpha "$ALPHA" --num_train_epochs "$EPOCHS" \
        --learning_rate "${LEARNING_RATE:-1e-4}" --num_warmup_steps "${WARMUP_STEPS:-0}" \
        --per_device_train_batch_size "${WINDOWS_PER_STEP:-2}" --seed "$SEED" ${INIT:+"$INIT"} ${stored[@]+"${stored[@]}"}
    memory="$run/memory/epoch_$EPOCHS"
    joint=("$PYTHON" -m evaluate_joint --do_test "${base[@]}" "${block[@]}" --knn_generator_path "$memory")
    # shellcheck disable=SC2086
    once "validation $name $value" "${joint[@]}" --dataset_split_name validation --dstore_path "$(dstore validation)" \
        --output_dir "$run/validation" --lmbda $LAMBDAS
    once "test $name $value" "${joint[@]}" --dataset_split_name test --dstore_path "$(dstore test)" \
        --output_dir "$run/test" --choose_on "$run/validation/results.json"
done
run "report" "$PYTHON" -m downstream.report ablation --setting "$title" --runs "$WORK/$name" --values "${values[@]}" \
    --output_dir "$OUTPUT/$name"
