#!/usr/bin/env bash
#SBATCH --job-name=mlpmem-windows
#SBATCH --nodes=1
#SBATCH --requeue
# Text to token windows, on one machine without GPUs. Settings: those of scripts/preprocess_dataset.sh.
# shellcheck source=scripts/slurm/common.sh
. "${MLPMEM_ROOT:-${SLURM_SUBMIT_DIR:-.}}/scripts/slurm/common.sh"

run "windows" bash scripts/preprocess_dataset.sh
