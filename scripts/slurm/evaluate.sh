#!/usr/bin/env bash
#SBATCH --job-name=mlpmem-evaluate
#SBATCH --requeue
# Perplexity of base + memory, on all GPUs of the job.
# Settings (environment): MODEL KNN_PATH DATASET SUBSET BATCH_SIZE_EVAL LAMBDA KNN_TEMP_MEMORY OUTPUT_DIR EPOCHS
# shellcheck source=scripts/slurm/common.sh
. "${MLPMEM_ROOT:-${SLURM_SUBMIT_DIR:-.}}/scripts/slurm/common.sh"
on_all_machines
export KNN_PATH="${KNN_PATH:-./output/mlpmem-gpt2-large/epoch_${EPOCHS:-50}}"
export KNN_TEMP="${KNN_TEMP_MEMORY:-1}"  # KNN_TEMP itself is that of the targets
. scripts/evaluate_joint.sh
