"""Cases that `make test` and CI leave to `make test-thorough`, because a quicker case says nearly as much.

Never listed here: LLaVA's masks, step 0, resuming a killed run, recorded scores, stock PEFT, protection.
"""

from __future__ import annotations

import re

# Regular expressions for the start of "FILE::TEST[CASE]", by what `make test` keeps of them.
THOROUGH: dict[str, tuple[str, ...]] = {
    "README's commands run, and all pages use flags that exist": (
        r"test_documented\.py::test_(the_commands_of_a_page_run|a_block_of_python_runs)\[docs/(?!api)",
        r"test_examples\.py::test_a_script_runs_and_saves_an_adapter\[(?!llava_own_data)",
    ),
    "a simulated device: the losses of one training, a generation, each kind of operation": (
        r"test_device_train\.py::",
        r"test_device_commands\.py::test_the_answers_and_measures",
        r"test_device_adapter\.py::test_apply_train_save_load_and_merge\[(?!llava)",
    ),
    "ZeRO-3: the factors and A of MiLoRA in two processes": (
        r"test_distributed\.py::test_(zero3|a_projector_loads)",
        r"test_processes\.py::test_each_layer",
        r"test_processes\.py::test_(a_broken_weight|ranks_share)",
    ),
    "one training where several say as much": (
        r"test_interrupted\.py::test_(a_run_with_loader_processes_that_was_killed_in|sigterm_to_all_processes)",
        r"test_dirty_data\.py::",
        r"test_interrupted\.py::test_a_loader_process_that_dies.*-hangs",
        r"test_demo\.py::test_a_step_that_fails",
        r"test_records\.py::test_a_(large_list|loader_process)",
        r"test_chat_template_runs\.py::test_a_tokenizer_without_one.*\[tiny\]",
        r"test_sweep_killed\.py::test_(what_a_first|the_plan_shows)",
        r"test_embedded\.py::test_training_reads_them_as_they_are\[(stream|skip)",
        r"test_embedded\.py::test_training_names_file_and_record_of_a_broken_one\[(?!empty)",
        r"test_train\.py::test_(checkpointing_and_bf16|accumulation_equals)",
        r"test_train\.py::test_every_method_trains.*\[(lora|projector|full)\]",
        r"test_train\.py::test_a_broken_picture.*\[1\]",
        r"test_continued\.py::test_the_second_training.*\[(?!protected)",
        r"test_resumed\.py::test_a_constant_schedule",
        r"test_fixed_A\.py::test_hf_trainer.*adafactor",
        r"test_base_kl\.py::test_another_method_from_the_recipe",
        r"test_held_out\.py::test_a_record_that",
        r"test_(modules\.py::|peft_model\.py::test_a_compiled_model)",
        r"test_vlm_train\.py::test_a_run_is_asked_evaluated",
        r"test_vlm_train\.py::test_a_run_learns.*packing",
        r"test_video_run\.py::test_the_plan_counts",
        r"test_saved_sets\.py::test_a_training_reads_it\[.*(streaming|packing)",
        r"test_run_folder\.py::test_a_second_training",
        r"test_hub\.py::test_a_push_that_fails",
        r"test_screen\.py::test_a_training_into_a_pipe",
    ),
    "plans of three recipes and of each kind of launch": (
        r"test_recipes\.py::test_it_fits_devices.*\[(?!milora-llava-1\.5-7b|smol-llava-demo)",
        r"test_dry_run\.py::test_(a_named_model_of_another|packing_is_planned|a_stream_is_planned)",
        r"test_llava_scripts\.py::test_every_script.*\[(?!scripts/v1_5/finetune_lora)",
        r"test_llava_scripts\.py::test_(both_stages|a_whole_model)",
        r"test_dry_run\.py::test_(fsdp_is|the_term_in|a_plan_is_made_for_devices|a_packaged_recipe)",
        r"test_estimate\.py::test_few_layers",
        r"test_command_lines\.py::test_plans_and_lists",
    ),
    "one family, task or data set where several say as much": (
        r"test_families\.py::test_from_start_to_merge.*\[(?!llava\]|llama\]|qwen2_5_vl\])",
        r"test_study_tasks\.py::.*\[(minilm|[\w-]+\.minilm)",
        r"test_studies\.py::test_a_study_runs",
        r"test_emoji\.py::(?!test_the_set_of_another)",
        r"test_loading\.py::test_a_(tokenizer_model_alone|mistyped_id)",
        r"test_compose\.py::test_timms_features.*swin",
        r"test_svd\.py::test_both_singular.*dtype1-.*very many",
        r"test_easy_vqa\.py::test_every_official_question",
        r"test_eval_compare\.py::test_an_interval_that_misses.*\[(?!0\.25-0\.25)",
    ),
}
_STARTS = [re.compile(start) for starts in THOROUGH.values() for start in starts]


def is_thorough(node_id: str) -> bool:
    """Return whether `make test` leaves this test out."""
    path, _, rest = node_id.partition("::")
    return any(start.match(f"{path.rpartition('/')[2]}::{rest}") for start in _STARTS)
