#!/usr/bin/env bash
# One machine's part of a launch; srun starts it on each machine of a job (see common.sh beside it).
set -euo pipefail
machines="${SLURM_JOB_NUM_NODES:-1}"
# Each process gets its share of the cores; else accelerate gives it one thread.
cores="${SLURM_CPUS_PER_TASK:-$(nproc)}"
share="$((cores > GPUS_PER_NODE ? cores / GPUS_PER_NODE : 1))"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$share}"
exec "$PYTHON" -m accelerate.commands.launch --config_file "$ACCELERATE_CONFIG" \
    --num_machines "$machines" --num_processes "$((machines * GPUS_PER_NODE))" --machine_rank "${SLURM_NODEID:-0}" \
    --main_process_ip "$MAIN_HOST" --main_process_port "$MAIN_PORT" "$@"
