"""Flags of the original's parsers without a use here: accepted, and dropped with one line. One with * takes no value."""

COMMON = (
    "dataset_config_name train_file validation_file validation_split_percentage use_slow_tokenizer* "
    "preprocessing_num_workers overwrite_cache* no_keep_linebreaks* push_to_hub* hub_token low_cpu_mem_usage* block_size "
    "group_name"
)
TRAINERS = f"{COMMON} from_scratch* generator_type do_test* vocab_size current_epoch"
EVALUATE_JOINT = (
    f"{COMMON} per_device_train_batch_size learning_rate weight_decay gradient_accumulation_steps lr_scheduler_type "
    "num_warmup_steps checkpointing_steps resume_from_checkpoint with_tracking* project_name run_name logging_steps knn_keytype"
)
TRAIN_BASE = (
    "model_type config_overrides use_fast_tokenizer use_auth_token group_name overwrite_cache validation_split_percentage "
    "keep_linebreaks prompt knn_keytype dstore_file knn_sim_func"
)
EVAL_QA = (
    "use_fast_tokenizer use_auth_token source_lang target_lang train_file validation_file test_file overwrite_cache "
    "preprocessing_num_workers max_source_length max_target_length val_max_target_length pad_to_max_length "
    "max_train_samples max_predict_samples ignore_pad_token_for_loss patience"
)
