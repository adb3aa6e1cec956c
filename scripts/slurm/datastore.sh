#!/usr/bin/env bash
#SBATCH --job-name=mlpmem-datastore
#SBATCH --requeue
# Hidden states of one split, on all GPUs of the job; each process writes its own parts.
# Settings (environment): MODEL_TO_SAVE DATASET SUBSET DSTORE_DIR BATCH_SIZE_EVAL LAYER_POSITION SAVE_LOGPROB OUTPUT_DIR
# shellcheck source=scripts/slurm/common.sh
. "${MLPMEM_ROOT:-${SLURM_SUBMIT_DIR:-.}}/scripts/slurm/common.sh"
on_all_machines
export STAGES=datastore
. scripts/save_pipeline.sh
