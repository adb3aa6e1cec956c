#!/usr/bin/env bash
#SBATCH --job-name=mlpmem-index
#SBATCH --requeue
# The index over a datastore. With several processes each fills its own shards of it.
# Settings (environment): DSTORE_PATH INDEX_PATH NCENTROIDS CODE_SIZE PROBE NUM_KEYS_TO_ADD INDEX_FACTORY
# shellcheck source=scripts/slurm/common.sh
. "${MLPMEM_ROOT:-${SLURM_SUBMIT_DIR:-.}}/scripts/slurm/common.sh"
on_all_machines
export STAGES=index
export DSTORE_PATH="${DSTORE_PATH:-./dstore/wikitext-gpt2/dstore_gpt2_train_1600.arrow}"
. scripts/save_pipeline.sh
