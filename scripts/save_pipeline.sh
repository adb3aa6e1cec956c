#!/usr/bin/env bash
# kNN training signals in three stages: hidden states, index, kNN distributions. An interrupted run continues.
# Settings (environment variables; relative paths are from the repository's root):
#   MODEL_TO_SAVE DATASET SUBSET DSTORE_DIR OUTPUT_DIR BATCH_SIZE_EVAL LAYER_POSITION TORCH_DTYPE     hidden states
#   DSTORE_PATH INDEX_PATH NCENTROIDS CODE_SIZE PROBE NUM_KEYS_TO_ADD INDEX_FACTORY                   index
#   VAL_PATH K KNN_TEMP BATCH_SIZE_KNN OUTPUT_PATH                                                    kNN distributions
#   ACCELERATE_CONFIG    a file of accelerate_config/ (default: one process on each GPU)
#   STAGES               those of "datastore index targets" to run (default: all)
# shellcheck source=scripts/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
find_python
find_launcher

: "${MODEL_TO_SAVE:=Clover-Hill/gpt2-xl-finetuned-wikitext103}" "${STAGES:=datastore index targets}"
: "${SUBSET:=train}" "${DSTORE_DIR:=./dstore/wikitext-gpt2}" "${PROBE:=32}"
wanted() { [[ " $STAGES " == *" $1 "* ]]; }

if wanted datastore; then
    run "save embeddings" "${LAUNCH[@]}" -m train_base \
        --model_name_or_path "$MODEL_TO_SAVE" --dataset_name "${DATASET:-./dataset/wikitext-gpt2}" \
        --do_eval --eval_subset "$SUBSET" --per_device_eval_batch_size "${BATCH_SIZE_EVAL:-16}" \
        --layer_position "${LAYER_POSITION:--1}" --output_dir "${OUTPUT_DIR:-tmp/}" --dstore_dir "$DSTORE_DIR" \
        --save_knnlm_dstore --report_to none --torch_dtype "${TORCH_DTYPE:-auto}"
fi
[ "$STAGES" != datastore ] || exit 0

DSTORE_PATH="${DSTORE_PATH:-$(find "$DSTORE_DIR" -maxdepth 1 -name "dstore_*_${SUBSET}_*.arrow" -print -quit)}"
dim="${DSTORE_PATH##*_}"
INDEX_PATH="${INDEX_PATH:-$DSTORE_DIR/${SUBSET}_${dim%.arrow}.index}"
if wanted index; then
    run "build index" "${LAUNCH[@]}" -m knn_utils.build_index \
        --dstore_path "$DSTORE_PATH" --index_path "$INDEX_PATH" \
        --num_keys_to_add_at_a_time "${NUM_KEYS_TO_ADD:-500000}" --ncentroids "${NCENTROIDS:-4096}" \
        --code_size "${CODE_SIZE:-64}" --probe "$PROBE" ${INDEX_FACTORY:+--index_factory "$INDEX_FACTORY"} \
        ${ON_GPU[@]+"${ON_GPU[@]}"}
fi
if wanted targets; then
    run "search kNN distributions" "${LAUNCH[@]}" -m knn_utils.saveKNNMulti \
        --model_path "$MODEL_TO_SAVE" --dstore_path "$DSTORE_PATH" --val_path "${VAL_PATH:-$DSTORE_PATH}" \
        --index_path "$INDEX_PATH" --output_path "${OUTPUT_PATH:-$DSTORE_DIR/knn_targets_$SUBSET}" --k "${K:-1024}" \
        --knn_temp "${KNN_TEMP:-16}" --probe "$PROBE" --batch_size "${BATCH_SIZE_KNN:-16000}" --ignore_first True \
        ${ON_GPU[@]+"${ON_GPU[@]}"}
fi
