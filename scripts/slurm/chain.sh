#!/usr/bin/env bash
# The whole chain as jobs, each waiting for those it needs: bash scripts/slurm/chain.sh
#
# Submitting the chain again is safe: a stage whose files are complete ends at once, an interrupted one continues.
# Settings (environment variables; the stages' own, at the top of their scripts, are passed on to the jobs):
#   MODEL_TO_SAVE   teacher: its hidden states make the kNN targets     (default: GPT2-xl fine-tuned on WikiText-103)
#   MODEL           student: the memory is trained for it               (default: GPT2-large fine-tuned on WikiText-103)
#   TEACHER_DIM STUDENT_DIM MODEL_TYPE    widths and family, which name the datastores  (default: 1600, 1280, gpt2)
#   SOURCE DATASET_CONFIG                 text: hub name or folder (default: WikiText-103)
#   DATASET                               folder of the windows made from it
#   DSTORE_DIR STUDENT_DSTORE_DIR OUTPUT_DIR RESULTS_DIR
#   NODES GPUS_PER_NODE                   machines of the GPU jobs (default: 1 of 8)
#   CPUS_PER_GPU MEMORY_PER_GPU           requested with each GPU, memory in GB; empty: the cluster's default (default: 8, 48)
#   NUM_PROC                              CPUs of the first stage      (default: 1)
#   PARTITION CPU_PARTITION ACCOUNT TIME  where and how long the jobs may run
# shellcheck source=scripts/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
export MLPMEM_ROOT="$PWD"
mkdir -p "${LOGS:=slurm_logs}"

export MODEL_TO_SAVE MODEL DATASET GPUS_PER_NODE EPOCHS
: "${MODEL_TO_SAVE:=Clover-Hill/gpt2-xl-finetuned-wikitext103}" "${DATASET:=./dataset/wikitext-gpt2}"
: "${MODEL:=Rubin-Wei/gpt2-large-finetuned-wikitext103}" "${GPUS_PER_NODE:=8}" "${EPOCHS:=50}"
: "${CPUS_PER_GPU=8}" "${MEMORY_PER_GPU=48}"
: "${TEACHER_DIM:=1600}" "${STUDENT_DIM:=1280}" "${MODEL_TYPE:=gpt2}" "${DSTORE_DIR:=./dstore/wikitext-gpt2}"
: "${STUDENT_DSTORE_DIR:=./dstore/wikitext-gpt2-large}" "${OUTPUT_DIR:=./output/mlpmem-gpt2-large}"
teacher="$DSTORE_DIR/dstore_${MODEL_TYPE}_train_$TEACHER_DIM.arrow"
student="$STUDENT_DSTORE_DIR/dstore_${MODEL_TYPE}_train_$STUDENT_DIM.arrow"
index="$DSTORE_DIR/train_$TEACHER_DIM.index"
targets="$DSTORE_DIR/knn_targets_train"

# submit STAGE KIND NEEDED-JOBS VARIABLES...: sets JOB to the new job's number.
submit() {
    local stage="$1" kind="$2" needed="$3" options=() partition="${PARTITION:-}"
    shift 3
    STAGE="submit $stage"
    if [ "$kind" = gpu ]; then
        options=(--nodes "${NODES:-1}" --ntasks-per-node 1 --gpus-per-node "$GPUS_PER_NODE")
        [ -z "$CPUS_PER_GPU" ] || options+=(--cpus-per-task "$((CPUS_PER_GPU * GPUS_PER_NODE))")
        [ -z "$MEMORY_PER_GPU" ] || options+=(--mem "$((MEMORY_PER_GPU * GPUS_PER_NODE))G")
    else
        options=(--cpus-per-task "${NUM_PROC:-1}")
        partition="${CPU_PARTITION:-$partition}"
    fi
    [ -z "$partition" ] || options+=(--partition "$partition")
    [ -z "${ACCOUNT:-}" ] || options+=(--account "$ACCOUNT")
    [ -z "${TIME:-}" ] || options+=(--time "$TIME")
    [ -z "$needed" ] || options+=(--dependency "afterok:$needed" --kill-on-invalid-dep=yes)
    JOB="$(env "$@" sbatch --parsable --export=ALL --open-mode=append --output "$LOGS/$stage-%j.log" \
        "${options[@]}" scripts/slurm/job.sh "$stage")"
    JOB="${JOB%%;*}"
    echo "$stage: job $JOB${needed:+, after $needed}"
}

submit windows cpu "" DATASET="${SOURCE:-Salesforce/wikitext}" OUTPUT_DIR="$DATASET" TOKENIZER="${TOKENIZER:-$MODEL}"
windows="$JOB"
submit datastore gpu "$windows" DSTORE_DIR="$DSTORE_DIR" OUTPUT_DIR="$DSTORE_DIR/tmp"
teacher_job="$JOB"
submit datastore gpu "$windows" MODEL_TO_SAVE="$MODEL" DSTORE_DIR="$STUDENT_DSTORE_DIR" \
    OUTPUT_DIR="$STUDENT_DSTORE_DIR/tmp"
student_job="$JOB"
submit index gpu "$teacher_job" DSTORE_PATH="$teacher" INDEX_PATH="$index"
submit targets gpu "$JOB" DSTORE_PATH="$teacher" INDEX_PATH="$index" OUTPUT_PATH="$targets"
submit train gpu "$JOB:$student_job" KNN_SAVE_PATH="$targets" DSTORE_PATH="$student" OUTPUT_DIR="$OUTPUT_DIR"
submit evaluate gpu "$JOB" KNN_PATH="$OUTPUT_DIR/epoch_$EPOCHS" OUTPUT_DIR="${RESULTS_DIR:-results/slurm}" SUBSET=test
STAGE="done"
