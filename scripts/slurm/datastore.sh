#!/usr/bin/env bash
#SBATCH --job-name=mlpmem-datastore
#SBATCH --requeue
# Hidden states of one split, on all GPUs of the job; each process writes its own parts.
# Settings (environment): MODEL_TO_SAVE DATASET SUBSET DSTORE_DIR BATCH_SIZE_EVAL LAYER_POSITION SAVE_LOGPROB OUTPUT_DIR
# shellcheck source=scripts/slurm/common.sh
. "${MLPMEM_ROOT:-${SLURM_SUBMIT_DIR:-.}}/scripts/slurm/common.sh"

logprob=()
[ -z "${SAVE_LOGPROB:-}" ] || logprob=(--save_logprob)
on_all "datastore" -m train_base \
    --model_name_or_path "${MODEL_TO_SAVE:-Clover-Hill/gpt2-xl-finetuned-wikitext103}" \
    --dataset_name "${DATASET:-./dataset/wikitext-gpt2}" \
    --do_eval --eval_subset "${SUBSET:-train}" \
    --per_device_eval_batch_size "${BATCH_SIZE_EVAL:-16}" \
    --layer_position "${LAYER_POSITION:--1}" \
    --output_dir "${OUTPUT_DIR:-tmp/}" \
    --dstore_dir "${DSTORE_DIR:-./dstore/wikitext-gpt2}" \
    --save_knnlm_dstore "${logprob[@]}" \
    --report_to none
