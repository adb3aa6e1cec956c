# shellcheck shell=bash disable=SC2034
# Shared by the jobs: the repository's root (sbatch runs a copy of a job's script, so its place says nothing), and
# launching on all of a job's machines. A job that was interrupted is queued again and continues where it stopped.
cd "${MLPMEM_ROOT:-${SLURM_SUBMIT_DIR:-$(dirname "${BASH_SOURCE[0]}")/../..}}"
# shellcheck source=scripts/common.sh
. scripts/common.sh
find_python
export PYTHON

# on_all_machines: ON_ALL, the beginning of a command on every machine of the job, one process for each GPU.
on_all_machines() {
    local machines="${SLURM_JOB_NUM_NODES:-1}" hosts
    GPUS_PER_NODE="${GPUS_PER_NODE:-8}"
    hosts="$(scontrol show hostnames "${SLURM_JOB_NODELIST:-localhost}")"
    MAIN_HOST="${hosts%%$'\n'*}"
    # Jobs that share a machine need ports of their own.
    MAIN_PORT="$((20000 + ${SLURM_JOB_ID:-0} % 20000))"
    if [ -z "${ACCELERATE_CONFIG:-}" ]; then
        ACCELERATE_CONFIG=accelerate_config/8_card.yaml
        [ "$machines" -eq 1 ] || ACCELERATE_CONFIG=accelerate_config/multi_node.yaml
    fi
    export ACCELERATE_CONFIG GPUS_PER_NODE MAIN_HOST MAIN_PORT
    # srun does not take over by itself what the job asked for.
    ON_ALL=(srun --nodes "$machines" --ntasks "$machines" --ntasks-per-node 1 --kill-on-bad-exit=1
        ${SLURM_CPUS_PER_TASK:+--cpus-per-task "$SLURM_CPUS_PER_TASK"}
        ${SLURM_MEM_PER_NODE:+--mem "$SLURM_MEM_PER_NODE"}
        bash scripts/slurm/machine.sh)
}
