"""May a resumed run change it? A table of all recipe keys and training arguments, with their effect on weights.

A missing key counts as `decides`, and a test fails until the table lists it. Training arguments have the names of the
newest transformers, as in a recipe.
"""

from __future__ import annotations

from typing import Literal

Effect = Literal["decides", "model", "policy", "fallback", "dtype", "records", "batch", "length", "selection", "stream",
                 "checkpoint", "free"]  # fmt: skip

TABLE: dict[Effect, str] = {
    # Another value trains different weights, or does not fit the saved optimizer state.
    "decides": """
        quantization quant_type double_quant projector_weights template form
        parts.vision_tower parts.vision_weights parts.select_layer parts.select_feature
        calibration.samples calibration.pictures calibration.text calibration.data
        data.max_length data.image_aspect_ratio data.min_pixels data.max_pixels data.jpeg_decoding data.packing
        data.bad_images data.web_pictures data.streaming
        data.shuffle_buffer data.limit
        train.accelerator_config train.adafactor train.adam_beta1 train.adam_beta2 train.adam_epsilon
        train.auto_find_batch_size train.average_tokens_across_devices train.bf16 train.data_seed
        train.dataloader_drop_last train.dataloader_in_order train.fp16 train.fp16_backend train.fp16_opt_level
        train.half_precision_backend train.ignore_data_skip train.load_best_model_at_end train.lr_scheduler_kwargs
        train.lr_scheduler_type train.max_grad_norm train.mp_parameters train.neftune_noise_alpha train.optim
        train.optim_args train.optim_target_modules train.parallelism_config train.past_index train.seed train.tf32
        train.train_sampling_strategy train.warmup_steps
    """,
    "model": "model",  # the same weights may have several names
    "policy": "policy",  # compared rule by rule
    "fallback": "train.learning_rate train.weight_decay",  # matter if a rule does not set them
    "dtype": "dtype",  # `auto` and `fastest` depend on the machine
    "records": "data.path",  # another file may hold the same records
    "batch": "train.per_device_train_batch_size train.gradient_accumulation_steps",  # only their product matters
    "length": "train.max_steps train.num_train_epochs",  # matter if the schedule depends on the last step
    # These matter if evaluations choose the best checkpoint or set the learning rate.
    "selection": """
        data.eval_path eval.suite_every eval.suite_limit
        train.bf16_full_eval train.eval_delay train.eval_on_start train.eval_steps train.eval_strategy
        train.fp16_full_eval train.greater_is_better train.metric_for_best_model train.save_steps train.save_strategy
    """,
    "stream": "train.dataloader_num_workers",  # sets the order of the records of a stream
    "checkpoint": "train.deepspeed",  # resuming.warnings reads the files of the checkpoint
    # Paths, logging, saving and speed: the weights stay the same, up to rounding.
    "free": """
        attn_implementation factor_cache data.image_folder data.feature_cache calibration.image_folder
        eval.suites eval.data eval.limit eval.forgetting_every
        sweep.suite sweep.data sweep.limit sweep.train sweep.variants
        train.activation_checkpointing train.activation_checkpointing_kwargs train.batch_eval_metrics
        train.dataloader_multiprocessing_context train.dataloader_persistent_workers train.dataloader_pin_memory
        train.dataloader_prefetch_factor train.ddp_backend train.ddp_broadcast_buffers train.ddp_bucket_cap_mb
        train.ddp_find_unused_parameters train.ddp_static_graph train.ddp_timeout train.debug train.disable_tqdm
        train.do_eval train.do_predict train.do_train train.enable_jit_checkpoint train.eval_accumulation_steps
        train.eval_do_concat_batches train.eval_use_gather_object train.fsdp train.fsdp_config
        train.fsdp_min_num_params train.fsdp_transformer_layer_cls_to_wrap train.full_determinism train.hub_always_push
        train.hub_model_id train.hub_private_repo train.hub_revision train.hub_strategy train.hub_token
        train.include_for_metrics train.include_inputs_for_metrics train.include_num_input_tokens_seen
        train.include_tokens_per_second train.jit_mode_eval train.label_names train.length_column_name
        train.liger_kernel_config train.log_level train.log_level_replica train.log_on_each_node train.logging_dir
        train.logging_first_step train.logging_nan_inf_filter train.logging_steps train.logging_strategy
        train.per_device_eval_batch_size train.prediction_loss_only train.project train.push_to_hub
        train.push_to_hub_organization train.ray_scope train.remove_unused_columns train.report_to
        train.restore_callback_states_from_checkpoint train.run_name train.save_on_each_node train.save_only_model
        train.save_total_limit train.skip_memory_metrics train.torch_compile train.torch_compile_backend
        train.torch_compile_mode train.torch_empty_cache_steps train.tpu_metrics_debug train.tpu_num_cores
        train.trackio_bucket_id train.trackio_space_id train.trackio_static_space_id train.use_cache train.use_cpu
        train.use_legacy_prediction_loop train.use_liger_kernel train.use_mps_device
    """,
}
EFFECTS: dict[str, Effect] = {key: effect for effect, keys in TABLE.items() for key in keys.split()}

# Schedules whose rates do not depend on the last step, unless the warm-up is a share of all steps.
SCHEDULES_WITHOUT_END = ("constant", "constant_with_warmup", "inverse_sqrt", "reduce_lr_on_plateau", "greedy")
SCHEDULES_BY_EVALUATION = ("reduce_lr_on_plateau", "greedy")


def effect_of(key: str) -> Effect:
    """Return the effect of a recipe key; `decides` for an unknown key.

    >>> effect_of("train.save_steps"), effect_of("train.from_the_future")
    ('selection', 'decides')
    """
    return EFFECTS.get(key, "decides")
