# shellcheck shell=bash disable=SC2034
# The stages from text to a memory with its gate on one machine, for quickstart.sh and remember.sh. They read and write files in
# $WORK, for the base $MODEL. Further arguments of a stage go to its command. Settings (environment variables): BLOCK_SIZE SEED
# K PROBE INDEX_FACTORY SAMPLED OWN_HEAD LAYERS EPOCHS LEARNING_RATE ALPHA DROPOUT WINDOWS_PER_STEP KNOWN_WEIGHT CAUTION DTYPE;
# scripts/quickstart.sh explains them.
# shellcheck source=scripts/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

LAMBDAS="0.02 0.05 0.1 0.15 0.2 0.25 0.3 0.35 0.4 0.45 0.5 0.55 0.6 0.65 0.7 0.75 0.8 0.85 0.9"

# find_precision: dtype, of the hidden states and of scoring, and mixed, of training.
#
# Also the settings that no script has set. The paper trains from random weights at learning rate 5e-4 and alpha 0.5, with one
# lambda. With little text it is better to start from the base; twelve epochs at a small alpha make the memory learn the text,
# dropout keeps it from being overconfident elsewhere, and a gate switches it off where it does not know (docs/remember.md has
# the experiments).
find_precision() {
    : "${BLOCK_SIZE:=512}" "${SEED:=42}" "${K:=256}" "${PROBE:=8}" "${INDEX_FACTORY:=IVF512,Flat}" "${SAMPLED:=4096}"
    : "${LAYERS:=6}" "${LEARNING_RATE:=6e-4}" "${ALPHA:=0.2}" "${DROPOUT:=0.3}" "${WINDOWS_PER_STEP:=3}"
    : "${KNOWN_WEIGHT:=0.05}" "${CAUTION:=1}"
    dtype="$(python -c 'import sys; from utils.loading import BaseArguments
print(str(BaseArguments(torch_dtype=sys.argv[1]).dtype()).split(".")[-1])' "${DTYPE:-auto}")"
    case "$dtype" in bfloat16) mixed=bf16 half=(--bf16) ;; *) mixed=no half=() ;; esac
    echo "precision: $dtype"
}

# windows TEXT
windows() {
    once "windows" python utils/preprocess_dataset.py --dataset_name "$1" --tokenizer_path "$MODEL" \
        --output_dir "$WORK/windows" --block_size "$BLOCK_SIZE" --stride "$BLOCK_SIZE" --by_document --seed "$SEED" "${@:2}"
}

# embed SPLIT...: of held-out splits the base's log-probabilities too, which later stages read instead of running the base again.
embed() {
    once "datastore" python -m train_base --model_name_or_path "$MODEL" --dataset_name "$WORK/windows" --do_eval \
        --eval_subset "$@" --save_knnlm_dstore --dstore_dir "$WORK/dstore" --per_device_eval_batch_size 8 \
        --torch_dtype "$dtype" --output_dir "$WORK/embed" --report_to none ${2:+--save_logprob}
}

# dstore SPLIT: its datastore's folder.
dstore() { find "$WORK/dstore" -maxdepth 1 -name "dstore_*_$1_*.arrow" -print -quit; }

index() {
    once "index" python -m knn_utils.build_index --dstore_path "$(dstore train)" --index_path "$WORK/dstore/train.index" \
        --index_factory "$INDEX_FACTORY"
}

# knnlm SPLIT
knnlm() {
    once "kNN-LM $1" python -m train_base --do_eval --knn --dataset_name "$WORK/windows" --eval_subset "$1" \
        --dstore_path "$(dstore "$1")" --val_file "$(dstore train)" --index_file "$WORK/dstore/train.index" --k "$K" \
        --probe "$PROBE" --output_dir "$WORK/knnlm_$1" --report_to none "${@:2}"
}

targets() {
    once "kNN targets" python -m knn_utils.saveKNNMulti --dstore_path "$(dstore train)" --index_path "$WORK/dstore/train.index" \
        --output_path "$WORK/targets" --k "$K" --probe "$PROBE" --batch_size 4096 --ignore_first True "$@"
}

# memory: without a head of its own, in bfloat16 where that is the faster precision, and with a loss over a sampled part of the
# vocabulary.
memory() {
    local tied=(--sampled_vocabulary "$SAMPLED")
    [ "${OWN_HEAD:-0}" = 1 ] || tied+=(--tie_head)
    [ "$mixed" = no ] || tied+=(--save_dtype bfloat16)
    once "train the memory" python -m train_mlpmem_offline --model_name_or_path "$MODEL" --dataset_name "$WORK/windows" \
        --knn_save_path "$WORK/targets" --knn_dstore_path "$(dstore train)" --output_dir "$WORK/memory" --init_from_base \
        "${tied[@]}" --memory_layers "$LAYERS" --num_train_epochs "$EPOCHS" --learning_rate "$LEARNING_RATE" \
        --alpha "$ALPHA" --memory_dropout "$DROPOUT" --per_device_train_batch_size "$WINDOWS_PER_STEP" \
        --lr_scheduler_type linear --num_warmup_steps 10 --logging_steps 10 --micro_batch_rows 2048 --seed "$SEED" \
        --mixed_precision "$mixed" "$@"
}

# joint SPLIT
joint() {
    once "joint $1" python -m evaluate_joint --do_test --model_name_or_path "$MODEL" \
        --knn_generator_path "$WORK/memory/epoch_$EPOCHS" --dataset_name "$WORK/windows" --dataset_split_name "$1" \
        --output_dir "$WORK/joint_$1" --report_to none "${@:2}"
}

gate() {
    once "gate" python -m training.gate --model_name_or_path "$MODEL" --knn_generator_path "$WORK/memory/epoch_$EPOCHS" \
        --dataset_name "$WORK/windows" --known_weight "$KNOWN_WEIGHT" --caution "$CAUTION" --torch_dtype "$dtype" \
        --seed "$SEED" "$@"
}
