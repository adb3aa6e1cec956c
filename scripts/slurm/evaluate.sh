#!/usr/bin/env bash
#SBATCH --job-name=mlpmem-evaluate
#SBATCH --requeue
# Perplexity of base + memory, on all GPUs of the job.
# Settings (environment): MODEL KNN_PATH DATASET SUBSET BATCH_SIZE_EVAL LAMBDA KNN_TEMP_MEMORY OUTPUT_DIR
# shellcheck source=scripts/slurm/common.sh
. "${MLPMEM_ROOT:-${SLURM_SUBMIT_DIR:-.}}/scripts/slurm/common.sh"

read -r -a lmbda <<<"${LAMBDA:-0.25}"
read -r -a knn_temp <<<"${KNN_TEMP_MEMORY:-1}"
on_all "evaluate" -m evaluate_joint \
    --do_test \
    --model_name_or_path "${MODEL:-Rubin-Wei/gpt2-large-finetuned-wikitext103}" \
    --knn_generator_path "${KNN_PATH:-./output/mlpmem-gpt2-large/epoch_${EPOCHS:-50}}" \
    --dataset_name "${DATASET:-./dataset/wikitext-gpt2}" \
    --dataset_split_name "${SUBSET:-test}" \
    --per_device_eval_batch_size "${BATCH_SIZE_EVAL:-8}" \
    --lmbda "${lmbda[@]}" --knn_temp "${knn_temp[@]}" \
    --output_dir "${OUTPUT_DIR:-tmp/}" \
    --report_to none
