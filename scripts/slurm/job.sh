#!/usr/bin/env bash
#SBATCH --job-name=mlpmem
#SBATCH --requeue
# One stage as a Slurm job, on all GPUs of its machines: sbatch [options] scripts/slurm/job.sh STAGE
# STAGE: windows datastore index targets train evaluate. Settings are those of the stage's script in scripts/, from the
# environment, and GPUS_PER_NODE (default: 8), ACCELERATE_CONFIG (gpt2.yaml, llama_7B.yaml, mistral_7B.yaml shard the
# memory), EPOCHS. scripts/slurm/chain.sh submits all stages. A job that was interrupted is queued again and continues.
set -euo pipefail
cd "${MLPMEM_ROOT:-${SLURM_SUBMIT_DIR:-$(dirname "${BASH_SOURCE[0]}")/../..}}"  # sbatch runs a copy of this file
machines="${SLURM_JOB_NUM_NODES:-1}" gpus="$((${SLURM_JOB_NUM_NODES:-1} * ${GPUS_PER_NODE:=8}))"
config=multi_node
[ "$machines" -gt 1 ] || config=8_card

if [ "$1" = on-this-machine ]; then  # started by srun, once on each machine
    shift
    share="$((${SLURM_CPUS_PER_TASK:-$(nproc)} / GPUS_PER_NODE))"
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((share > 1 ? share : 1))}"
    # Jobs that share a machine need ports of their own.
    exec "${PYTHON:-python}" -m accelerate.commands.launch \
        --config_file "${ACCELERATE_CONFIG:-accelerate_config/$config.yaml}" \
        --num_machines "$machines" --num_processes "$gpus" --machine_rank "${SLURM_NODEID:-0}" \
        --main_process_ip "$MAIN_HOST" --main_process_port "$((20000 + ${SLURM_JOB_ID:-0} % 20000))" "$@"
fi

MAIN_HOST="$(scontrol show hostnames "${SLURM_JOB_NODELIST:-localhost}" | sed -n 1p)"
export MAIN_HOST GPUS_PER_NODE
# srun does not pass on by itself what the job asked for.
export LAUNCHER="srun --nodes $machines --ntasks $machines --ntasks-per-node 1 --kill-on-bad-exit=1 \
${SLURM_CPUS_PER_TASK:+--cpus-per-task $SLURM_CPUS_PER_TASK} ${SLURM_MEM_PER_NODE:+--mem $SLURM_MEM_PER_NODE} \
bash scripts/slurm/job.sh on-this-machine"
case "$1" in
    windows) bash scripts/preprocess_dataset.sh ;;
    datastore | index | targets) STAGES="$1" bash scripts/save_pipeline.sh ;;
    train)  # the paper's step of 128 windows on any number of GPUs
        export BATCH_SIZE="${BATCH_SIZE:-$((gpus > 8 ? 128 / gpus : 16))}" CHECKPOINTING_STEPS="${CHECKPOINTING_STEPS:-1000}"
        export GRADIENT_ACCUMULATION_STEPS="${GRADIENT_ACCUMULATION_STEPS:-$((gpus < 8 ? 8 / gpus : 1))}"
        bash scripts/train_mlpmem_offline.sh
        ;;
    evaluate) KNN_PATH="${KNN_PATH:-./output/mlpmem-gpt2-large/epoch_${EPOCHS:-50}}" bash scripts/evaluate_joint.sh ;;
    *) echo "error: stage $1: expected windows, datastore, index, targets, train or evaluate" >&2 && exit 2 ;;
esac
