#!/usr/bin/env bash
#SBATCH --job-name=mlpmem-targets
#SBATCH --requeue
# kNN distributions of every row of a datastore, on all GPUs of the job; each process writes its own parts.
# Settings (environment): DSTORE_PATH VAL_PATH INDEX_PATH OUTPUT_PATH K KNN_TEMP PROBE BATCH_SIZE_KNN
# shellcheck source=scripts/slurm/common.sh
. "${MLPMEM_ROOT:-${SLURM_SUBMIT_DIR:-.}}/scripts/slurm/common.sh"

DSTORE_PATH="${DSTORE_PATH:-./dstore/wikitext-gpt2/dstore_gpt2_train_1600.arrow}"
on_all "kNN targets" -m knn_utils.saveKNNMulti \
    --dstore_path "$DSTORE_PATH" \
    --val_path "${VAL_PATH:-$DSTORE_PATH}" \
    --index_path "${INDEX_PATH:-./dstore/wikitext-gpt2/train_1600.index}" \
    --output_path "${OUTPUT_PATH:-./dstore/wikitext-gpt2/knn_targets_train}" \
    --k "${K:-1024}" \
    --knn_temp "${KNN_TEMP:-16}" \
    --probe "${PROBE:-32}" \
    --batch_size "${BATCH_SIZE_KNN:-16000}" \
    --ignore_first True \
    --knn_gpu
