"""Every form of an adapter, and back: the same logits."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForImageTextToText, AutoProcessor

from milora_data.encode.templates import OWN, TRAINED_WITH, render_chat_template
from milora_data.records.record import Turn
from milora_vl import apply_milora, load_adapter, load_model, save_adapter
from milora_vl.common.errors import UserError
from milora_vl.export import Options, export
from milora_vl.export.__main__ import main
from milora_vl.models.generate import Prompt, generate
from milora_vl.models.prompts import prompts_of
from milora_vl.train.run import set_chat_template
from support.adapter_cases import LLAVA_POLICY, llava_batch, move, pissa_trained
from support.problems import raises_code

Factory = Callable[..., tuple[Any, Any]]
Q = "model.language_model.layers.0.self_attn.q_proj"


@torch.no_grad()
def logits(model: nn.Module, base: nn.Module) -> torch.Tensor:
    return model.eval()(**llava_batch(base)).logits


@pytest.fixture(scope="module")
def made(tiny_llava: Factory, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A base on disk, an adapter of every method on it, and the logits of both."""
    root = tmp_path_factory.mktemp("made")
    for part in tiny_llava():
        part.save_pretrained(root / "base")
    base = fresh(root)
    before = logits(base, base)
    model = apply_milora(base, [*LLAVA_POLICY, {"modules": "*embed_tokens", "method": "lora", "rank": 3}])
    move(model)
    save_adapter(model, root / "adapter")
    return SimpleNamespace(root=root, model=model, before=before, after=logits(model, base))


@pytest.fixture
def run(made: SimpleNamespace, tmp_path: Path) -> SimpleNamespace:
    """A copy of it to change."""
    shutil.copytree(made.root, tmp_path, dirs_exist_ok=True)
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(config.read_text(encoding="utf-8").replace(str(made.root), str(tmp_path)), encoding="utf-8")
    return SimpleNamespace(root=tmp_path, model=made.model, before=made.before, after=made.after)


def fresh(root: Path) -> nn.Module:
    return load_model(root / "base")[0]


def same(run: SimpleNamespace, model: nn.Module, atol: float = 1e-5) -> bool:
    got = logits(model, fresh(run.root))
    assert not torch.allclose(got, run.before, atol=1e-3)
    return torch.allclose(got, run.after, atol=atol)


def test_adapter_of_another_dtype_is_half_as_large_and_still_ours(run) -> None:
    done = export(run.root / "adapter", "adapter", run.root / "out", Options(dtype=torch.bfloat16))
    assert done.origin == "ours"
    assert done.total == pytest.approx(lost(run, "adapter", "out")[0], rel=1e-3)
    assert done.total > 1e-4
    stored = load_file(run.root / "out" / "adapter_model.safetensors")
    assert {t.dtype for t in stored.values()} == {torch.bfloat16}
    model = load_adapter(fresh(run.root), run.root / "out", is_trainable=True)
    assert same(run, model, atol=0.05)
    assert {t.method for t in model.milora_targets} == {"milora", "lora", "full"}
    assert AutoProcessor.from_pretrained(run.root / "out").tokenizer


@pytest.mark.parametrize("saved", ["processor", "tokenizer"])
def test_merged_loads_in_plain_transformers_with_its_processor(run, saved: str) -> None:
    if saved == "tokenizer":
        load_model(run.root / "base")[1].tokenizer.save_pretrained(run.root / "adapter")
    export(run.root / "adapter", "merged", run.root / "merged")
    assert same(run, AutoModelForImageTextToText.from_pretrained(run.root / "merged"))
    processor = AutoProcessor.from_pretrained(run.root / "merged")
    assert processor.tokenizer
    assert processor.image_processor
    assert not (run.root / "merged" / "adapter_config.json").exists()


@pytest.mark.parametrize("template", ["mistral", OWN])
def test_a_merged_model_is_asked_in_the_template_of_its_run(run, template: str) -> None:
    processor = load_model(run.root / "base")[1]
    if template == OWN:  # as a published model has it
        written = render_chat_template("mistral", processor.tokenizer).removeprefix(TRAINED_WITH)
        processor.tokenizer.chat_template = processor.chat_template = written
    set_chat_template(processor, template)
    processor.save_pretrained(run.root / "adapter")
    (run.root / "adapter" / "recipe.yaml").write_text(f"template: {template}\n")
    export(run.root / "adapter", "merged", run.root / "merged")
    asked = Prompt((Turn("user", "What is it?"),))
    answers = []
    for folder, chosen in ((run.root / "adapter", template), (run.root / "merged", None)):
        model, own = load_model(folder)
        own.tokenizer.chat_template = processor.tokenizer.chat_template
        used = chosen or prompts_of(str(folder), None).template
        answers.append(generate(model, own, [asked], template=used, max_new_tokens=8)[0])
    assert prompts_of(str(run.root / "merged"), None).template == OWN
    assert answers[0] == answers[1]
    assert prompts_of(str(run.root / "base"), None).template == "vicuna_v1"


def test_merged_keeps_the_dtype_of_the_base(run, tiny_llava: Factory) -> None:
    tiny_llava()[0].to(torch.bfloat16).save_pretrained(run.root / "base")
    done = export(run.root / "adapter", "merged", run.root / "merged")
    kept = load_file(run.root / "merged" / "model.safetensors")
    assert {t.dtype for t in kept.values()} == {torch.bfloat16}
    wide = export(run.root / "adapter", "merged", run.root / "wide", Options(dtype=torch.float32))
    exact = load_file(run.root / "wide" / "model.safetensors")
    assert {t.dtype for t in exact.values()} == {torch.float32}
    assert all(torch.equal(kept[name], weight.bfloat16()) for name, weight in exact.items())  # it was rounded once
    assert (done.dtype, wide.dtype) == ("bfloat16", "float32")


def lost(run, whole: str, small: str) -> tuple[float, dict[str, float]]:
    """How far the changes of one saved adapter are from another's, relatively: in total and by module."""
    full, other = (PeftModel.from_pretrained(fresh(run.root), run.root / name) for name in (whole, small))
    squares = {}
    for path in (t.path for t in run.model.milora_targets if t.rank is not None):
        first, second = (
            model.get_base_model().get_submodule(path).get_delta_weight("default").double() for model in (full, other)
        )
        squares[path] = float((first - second).square().sum()), float(first.square().sum())
    total = (sum(a for a, _ in squares.values()) / sum(b for _, b in squares.values())) ** 0.5
    return total, {path: (a / b) ** 0.5 for path, (a, b) in squares.items()}


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("form", ["rank-12", "rank-r", "rank-1"])
def test_recompression_loses_what_it_says(run, form: str, dtype: torch.dtype | None) -> None:
    done = export(run.root / "adapter", form, run.root / "small", Options(dtype=dtype))
    assert done.total is not None
    total, by_module = lost(run, "adapter", "small")
    assert done.total == pytest.approx(total, abs=2e-6)
    assert {path: error for path, (_, error) in done.layers.items()} == pytest.approx(by_module, abs=2e-6)
    small = PeftModel.from_pretrained(fresh(run.root), run.root / "small")
    for path, (rank, _) in done.layers.items():
        assert torch.linalg.matrix_rank(small.get_base_model().get_submodule(path).get_delta_weight("default")) <= rank
    if dtype is not None:
        assert done.total > 1e-3
    elif form == "rank-12":
        assert done.total < 1e-6
        assert same(run, small)
    else:
        assert done.total > 0.01


def test_a_plain_peft_folder_becomes_ours(run) -> None:
    config = LoraConfig(r=3, lora_alpha=5, target_modules=[Q], use_rslora=True, task_type="CAUSAL_LM")
    model = get_peft_model(fresh(run.root), config)
    move(model, 0.2)
    model.save_pretrained(run.root / "plain")
    expected = logits(model, fresh(run.root))
    done = export(run.root / "plain", "adapter", run.root / "ours")
    assert done.origin == "plain"
    ours = load_adapter(fresh(run.root), run.root / "ours")
    assert torch.allclose(logits(ours, fresh(run.root)), expected, atol=1e-5)
    assert [(t.path, t.method, t.rank) for t in ours.milora_targets] == [(Q, "lora", 3)]


def test_an_adapter_of_a_residual_base_is_refused_on_another_and_loads_and_merges_on_its_own(run) -> None:
    tuned = pissa_trained(fresh(run.root), run.root)
    tuned.peft_config["default"].base_model_name_or_path = str(run.root / "residual")
    tuned.save_pretrained(run.root / "trained")
    load_model(run.root / "base")[1].save_pretrained(run.root / "residual")
    run.after = logits(tuned, fresh(run.root))
    for target in ("merged", "rank-8", "llava"):
        with raises_code("", hint="--to merged --base RESIDUAL"):
            export(run.root / "trained", target, run.root / "out", Options(base=run.root / "base", vision_tower="clip"))
    export(run.root / "trained", "merged", run.root / "of-residual")  # the residual base is the base that it names
    assert same(run, load_model(run.root / "of-residual")[0])
    assert same(run, load_model(run.root / "residual", adapter=run.root / "trained")[0])
    with raises_code("", hint="--to merged --base RESIDUAL"):
        load_model(run.root / "base", adapter=run.root / "trained")
    with raises_code("", where="--scale", message="is a residual base"):
        load_model(run.root / "residual", adapter=run.root / "trained", scale=0.5)


def test_unconverted_starts_of_peft_are_refused_where_they_would_be_wrong(run) -> None:
    config = LoraConfig(r=4, target_modules=[Q], init_lora_weights="pissa")
    model = get_peft_model(fresh(run.root), config)
    model.save_pretrained(run.root / "plain")
    with raises_code("", hint="--to merged --base RESIDUAL"):
        export(run.root / "plain", "rank-2", run.root / "out")
    assert not (run.root / "out").exists()


def test_rank_r_keeps_the_rank_of_each_rule(run) -> None:
    """A module whose stored factors have its r, such as a plain LoRA, loses nothing."""
    done = export(run.root / "adapter", "rank-r", run.root / "out")
    ranks = {t.path: t.rank for t in run.model.milora_targets if t.rank is not None}
    assert {path: rank for path, (rank, _) in done.layers.items()} == ranks
    losses = {t.method: done.layers[t.path][1] for t in run.model.milora_targets if t.rank is not None}
    assert losses["lora"] < 1e-6 < 1e-2 < losses["milora"]


def test_another_base_is_refused(run, tiny_llava: Factory) -> None:
    tiny_llava(seed=1)[0].save_pretrained(run.root / "other")
    with raises_code("adapter-wrong-base"):
        export(run.root / "adapter", "merged", run.root / "out", Options(base=run.root / "other"))
    assert {path.name for path in run.root.iterdir()} == {"base", "adapter", "other"}


def test_the_command(run, capsys, monkeypatch) -> None:
    monkeypatch.chdir(run.root / "adapter")
    assert main([".", "--to", "rank-2"]) == 0
    text, said = capsys.readouterr()
    exact = re.search(r"warning: rank-2 loses \d+ % of the update; (rank-\d+) keeps all of it", said)
    assert exact is not None
    out = text.splitlines()
    assert out[-1] == str((run.root / "adapter-rank-2").resolve())
    assert out[-2].startswith("total  relative error ")
    assert len(out) == 17
    assert (run.root / "adapter-rank-2" / "adapter_model.safetensors").stat().st_mode & 0o777 == (
        run.root / "adapter-rank-2" / "adapter_config.json"
    ).stat().st_mode & 0o777
    assert main([".", "--to", exact[1], "--format", "json"]) == 0
    text, said = capsys.readouterr()
    assert json.loads(text)["total"] < 1e-6
    assert f"rank-{json.loads(text)['exact_rank']}" == exact[1]
    assert "warning" not in said
    assert main([str(run.root / "adapter"), "--to", "rank-r", "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["layers"][0]["rank"] > 0
    with raises_code(
        "adapter-missing", says=r"no adapter in this folder\nuse one of its subfolders:  .*/adapter, .*/adapter-rank"
    ):
        main([str(run.root), "--to", "merged", "--output_dir", str(run.root / "x")])
    for arguments, code, says in (
        (("--to", "rank-2"), "output-exists", "adapter-rank-2"),
        (("--to", "mergd"), "", r"did you mean merged\?"),
        (("--to", "merged", "--base", str(run.root / "nowhere" / "x")), "model-unknown", "^--base: "),
    ):
        with raises_code(code, says=says):
            main([str(run.root / "adapter"), *arguments])
    with raises_code("adapter-missing", says="no adapter in this folder\nfound "):
        main([str(run.root / "base"), "--to", "merged", "--output_dir", str(run.root / "x")])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"alora_invocation_tokens": [7, 8]}, r"an activated LoRA \(aLoRA\)"),
        ({"trainable_token_indices": [5, 6]}, "trained rows of the embeddings"),
        ({"lora_bias": True}, "a LoRA with trained biases"),
        ({"use_dora": True}, "DoRA weights"),
    ],
)
def test_what_is_more_than_pairs_of_factors_is_refused_by_name(run, more: dict[str, Any], message: str) -> None:
    config = LoraConfig(r=3, target_modules=[Q], task_type="CAUSAL_LM", **more)
    get_peft_model(fresh(run.root), config).save_pretrained(run.root / "plain")
    for form in ("adapter", "rank-2", "llava"):
        with raises_code("adapter-unsupported-kind", says=message):
            export(run.root / "plain", form, run.root / "out", Options(base=run.root / "base"))
    if {"alora_invocation_tokens", "lora_bias"} & more.keys():
        with raises_code("", message="PEFT cannot merge"):
            export(run.root / "plain", "merged", run.root / "out")
    assert not (run.root / "out").exists()


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_embeddings_with_an_adapter_whose_weight_peft_saved_along(run) -> None:
    names = ["embed_tokens", "lm_head", Q]
    config = LoraConfig(r=3, target_modules=names, task_type="CAUSAL_LM")
    model = get_peft_model(fresh(run.root), config)
    move(model, 0.1)
    model.save_pretrained(run.root / "plain")
    assert any("base_layer" in name for name in load_file(run.root / "plain" / "adapter_model.safetensors"))
    run.after = logits(model, fresh(run.root))
    for form in ("adapter", "rank-3"):
        out = export(run.root / "plain", form, run.root / "out" / form).folder
        assert not any("base_layer" in name for name in load_file(out / "adapter_model.safetensors"))
        assert same(run, PeftModel.from_pretrained(fresh(run.root), out))
    grown = fresh(run.root)
    grown.resize_token_embeddings(grown.get_input_embeddings().num_embeddings + 64)
    get_peft_model(grown, config).save_pretrained(run.root / "grown")
    for form in ("adapter", "rank-3"):
        with pytest.raises(UserError) as error:
            export(run.root / "grown", form, run.root / f"grown-{form}", Options(base=run.root / "base"))
        assert "the saved weight differs from the base model" in str(error.value)
