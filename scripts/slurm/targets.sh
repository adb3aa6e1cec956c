#!/usr/bin/env bash
#SBATCH --job-name=mlpmem-targets
#SBATCH --requeue
# kNN distributions of every row of a datastore, on all GPUs of the job; each process writes its own parts.
# Settings (environment): DSTORE_PATH VAL_PATH INDEX_PATH OUTPUT_PATH K KNN_TEMP PROBE BATCH_SIZE_KNN
# shellcheck source=scripts/slurm/common.sh
. "${MLPMEM_ROOT:-${SLURM_SUBMIT_DIR:-.}}/scripts/slurm/common.sh"
on_all_machines
export STAGES=targets
export DSTORE_PATH="${DSTORE_PATH:-./dstore/wikitext-gpt2/dstore_gpt2_train_1600.arrow}"
. scripts/save_pipeline.sh
