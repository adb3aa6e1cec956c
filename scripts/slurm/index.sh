#!/usr/bin/env bash
#SBATCH --job-name=mlpmem-index
#SBATCH --requeue
# The index over a datastore. With several processes each fills its own shards of it.
# Settings (environment): DSTORE_PATH INDEX_PATH NCENTROIDS CODE_SIZE PROBE NUM_KEYS_TO_ADD INDEX_FACTORY
# shellcheck source=scripts/slurm/common.sh
. "${MLPMEM_ROOT:-${SLURM_SUBMIT_DIR:-.}}/scripts/slurm/common.sh"

factory=()
[ -z "${INDEX_FACTORY:-}" ] || factory=(--index_factory "$INDEX_FACTORY")
on_all "index" -m knn_utils.build_index \
    --dstore_path "${DSTORE_PATH:-./dstore/wikitext-gpt2/dstore_gpt2_train_1600.arrow}" \
    --index_path "${INDEX_PATH:-./dstore/wikitext-gpt2/train_1600.index}" \
    --num_keys_to_add_at_a_time "${NUM_KEYS_TO_ADD:-500000}" \
    --ncentroids "${NCENTROIDS:-4096}" \
    --code_size "${CODE_SIZE:-64}" \
    --probe "${PROBE:-32}" "${factory[@]}"
