"""From flags and a recipe to the one recipe of the run, LLaVA's scripts included."""

from __future__ import annotations

from pathlib import Path

import pytest

from milora_vl.common.errors import UserError
from milora_vl.core.policy.rules import DEFAULT_RULES
from milora_vl.train.__main__ import main as train
from support.plans import fitted, section, settings
from support.problems import raises_code

# scripts/v1_5/finetune_lora.sh of haotian-liu/LLaVA, without its launcher.
FINETUNE_LORA = """--lora_enable True --lora_r 128 --lora_alpha 256 --mm_projector_lr 2e-5 --deepspeed zero3
--model_name_or_path llava-1.5-7b --version v1 --data_path mix.json --image_folder data
--vision_tower openai/clip-vit-large-patch14-336 --mm_projector_type mlp2x_gelu --mm_vision_select_layer -2
--mm_use_im_start_end False --mm_use_im_patch_token False --image_aspect_ratio pad --group_by_modality_length True
--bf16 True --output_dir out --num_train_epochs 1 --per_device_train_batch_size 16 --per_device_eval_batch_size 4
--gradient_accumulation_steps 1 --evaluation_strategy no --save_strategy steps --save_steps 50000 --save_total_limit 1
--learning_rate 2e-4 --weight_decay 0. --warmup_ratio 0.03 --lr_scheduler_type cosine --logging_steps 1 --tf32 True
--model_max_length 2048 --gradient_checkpointing True --dataloader_num_workers 4 --lazy_preprocess True
--report_to none"""


def test_flags_win_over_the_recipe() -> None:
    plain, flagged = settings("--recipe tiny-test"), settings("--recipe tiny-test --max_steps 3 --rank 2")
    assert plain.recipe.train["max_steps"] == 10
    assert flagged.recipe.train["max_steps"] == 3
    assert flagged.recipe.policy is not None
    assert flagged.recipe.policy[0]["rank"] == 2
    assert flagged.recipe.policy[0]["alpha"] == 2


def test_a_flag_by_an_older_name_wins_over_the_recipe_too(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("model: tiny\ntrain: {warmup_steps: 0.03, gradient_checkpointing: true}\n", encoding="utf-8")
    train = settings(f"--recipe {file} --warmup_ratio 0.1 --gradient_checkpointing False").recipe.train
    assert train["warmup_steps"] == 0.1
    assert train["activation_checkpointing"] is False
    assert settings(f"--recipe {file} --warmup_ratio 0").recipe.train["warmup_steps"] == 0
    with raises_code("recipe-contradiction", where="--warmup_steps"):
        settings(f"--recipe {file} --rank 4 --warmup_ratio 0.1 --warmup_steps 5")


def test_a_llava_script_means_milora_with_its_rank_and_its_projector_rate() -> None:
    chosen = settings(FINETUNE_LORA)
    assert chosen.recipe.policy == [
        {
            "modules": "language", "method": DEFAULT_RULES[0]["method"],
            "rank": 128, "alpha": 256, "dropout": 0.05, "learning_rate": 2e-4,
        },
        {"modules": "projector", "method": "full", "learning_rate": 2e-5},
    ]  # fmt: skip
    assert chosen.notes == [
        "LLaVA flags: --lora_enable True trains an adapter of rank 128 on the language tower and the projector in full"
    ]
    assert chosen.recipe.train["train_sampling_strategy"] == "group_by_length"
    assert chosen.recipe.train["warmup_steps"] == 0.03


def test_other_llava_scripts() -> None:
    lora = settings(FINETUNE_LORA + " --method lora").recipe
    assert lora.policy is not None
    assert lora.policy[0]["method"] == "lora"
    full = settings("--model tiny --vision_tower openai/clip-vit-large-patch14-336 --learning_rate 2e-5").recipe
    assert full.policy == [{"modules": "language.*", "method": "full"}, {"modules": "projector", "method": "full"}]
    stage1 = settings("--model tiny --tune_mm_mlp_adapter True --learning_rate 1e-3 --version plain").recipe
    assert stage1.policy == [{"modules": "projector", "method": "full"}]
    assert settings("--model tiny --lora_enable True --bits 4").recipe.quantization == "4bit"


def test_bits_alone_mean_a_quantised_base() -> None:
    plain = settings("--model tiny --rank 8").recipe
    for bits in ("4", "8"):
        assert settings(f"--model tiny --rank 8 --bits {bits}").recipe == plain.model_copy(
            update={"quantization": f"{bits}bit"}
        )
        quantised = settings(f"--recipe tiny-test --bits {bits}").recipe
        assert quantised == settings("--recipe tiny-test").recipe.model_copy(update={"quantization": f"{bits}bit"})
    with raises_code("flag-unsupported", where="--bits"):
        settings("--model tiny --bits 5")


@pytest.mark.parametrize(
    ("words", "code", "where", "text"),
    [
        ("--vision_tower x --rank 8", "policy-no-adapter-rule", "--rank", "add --lora_enable True"),
        ("--lora_enable False --lora_alpha 8", "policy-no-adapter-rule", "--alpha", "add --lora_enable True"),
        ("--tune_mm_mlp_adapter True --lora_dropout 0.1", "policy-no-adapter-rule", "--dropout", "makes an adapter"),
        ("--recipe tiny-test --lora_enable True", "flag-conflict", "--lora_enable", "the recipe"),
        ("--lora_enable True --mm_use_im_start_end True", "flag-unsupported", "--mm_use_im_start_end", "got True"),
        ("--lora_enable True --bits 5", "flag-unsupported", "--bits", "got 5; only 16, 8, 4"),
        ("--recipe tniy-test", "recipe-unknown", "--recipe", "did you mean tiny-test"),
        ("--policy none.yaml", "path-missing", "--policy", "none.yaml"),
        ("--model tiny --rank 4 --learning_rate nan", "flag-value", "--learning_rate", "expected a number, got 'nan'"),
        ("--model tiny --rank 4 --max_steps inf", "flag-value", "--max_steps", "expected a whole number, got 'inf'"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_an_error(words: str, code: str, where: str, text: str) -> None:
    with pytest.raises(UserError) as error:
        settings(f"--model tiny {words}")
    assert [(problem.code, problem.where) for problem in error.value.problems] == [(code, where)]
    assert text in str(error.value)


def test_a_policy_can_be_given_as_text() -> None:
    found = settings(["--model", "tiny", "--policy", "[{modules: projector, method: full, learning_rate: 1e-3}]"])
    assert found.recipe.policy == [{"modules": "projector", "method": "full", "learning_rate": 1e-3}]
    many = "{modules: language, method: milora, protect: 0, rank: 4}" + ", {modules: language.q_proj, rank: 2}" * 20
    assert len(settings(["--model", "tiny", "--policy", f"[{many}]"]).recipe.policy) == 21
    with raises_code("policy-value", where="policy[0].method", message="expected one of"):
        settings(["--model", "tiny", "--policy", "[{modules: language, method: fool, rank: 4}]"])


FAULTY = """
model: tiny
policy:
  - {modules: language, method: milora, protect: 0, rank: 0, alfa: 3}
  - {modules: "*.nothing", method: milora, protect: 0, rank: 4}
  - {modules: projector.linear_1, method: milora, protect: 0, rank: 4000}
  - {modules: "language.layers[0]", method: full, seed: 1}
train: {max_stepps: 3}
"""


def test_all_faults_of_a_recipe_come_together(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(FAULTY, encoding="utf-8")
    with pytest.raises(UserError) as caught:
        fitted(f"--recipe {file} --dtype odd")
    assert str(caught.value).startswith("4 problems:\n")
    for fault in (
        f"train.max_stepps in {file}: unknown key",
        f"policy[0].alfa in {file}: unknown key",
        f"policy[0].rank in {file}: expected a positive integer",
        "--dtype: expected",
    ):
        assert str(caught.value).count(fault) == 1


def test_rules_that_do_not_fit_the_model_are_told_with_their_key_before_anything_is_read(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    rules = "\n".join(FAULTY.splitlines()[:3] + FAULTY.splitlines()[4:-1])
    file.write_text(f"{rules}\ndata: {{path: nowhere.json}}\n", encoding="utf-8")
    with pytest.raises(UserError) as error:
        train(["--recipe", str(file), "--output_dir", str(tmp_path / "run")])
    assert len(error.value.problems) == 3
    assert error.value.first.code == "policy-no-match"
    assert error.value.first.where == f"policy[0].modules in {file}"
    fitted("--model tiny --rank 2")
    with pytest.raises(UserError) as error:
        fitted("--model tiny --rank 4000")
    assert {(problem.code, problem.where) for problem in error.value.problems} == {("policy-rank-too-large", "--rank")}
    small = fitted("--model tiny")
    assert {target.rank for target in small.targets} == {16}
    assert any("ranks are 16" in warning for warning in small.warnings)


@pytest.mark.parametrize(
    ("modules", "may_be"),
    [("language", False), ("language.*", False), ("vision", True), ("model.vision_tower.encoder.layers.2.*", True)],
)
def test_ddp_looks_for_unused_weights_where_the_last_layers_of_the_tower_may_train(modules: str, may_be: bool) -> None:
    """LLaVA reads the last layer but one, so those behind it get no gradient under any name of a rule."""
    found = section(["--model", "tiny", "--policy", f"[{{modules: {modules}, method: full}}]"])
    assert found.train["ddp_find_unused_parameters"] is may_be


RECIPE_WITH_EVALUATION = """\
model: tiny
data: {path: theirs.json, image_folder: images, eval_path: held-out.json}
train: {max_steps: 2, eval_strategy: steps, eval_steps: 1, load_best_model_at_end: true}
"""


def test_data_of_ones_own_comes_without_the_recipes_evaluation(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE_WITH_EVALUATION)
    made = settings(f"--recipe {recipe} --data_path mine.json")
    assert (made.recipe.data.path, made.recipe.data.eval_path) == ("mine.json", None)
    assert not {"eval_strategy", "load_best_model_at_end"} & made.recipe.train.keys()
    (note,) = made.notes
    assert "held-out.json" in note
    assert "--eval_data_path" in note
    demo = settings("--recipe smol-llava-demo --data_path mine.json --image_folder mine")
    assert demo.recipe.data.eval_path is None
    assert len(demo.notes) == 1
