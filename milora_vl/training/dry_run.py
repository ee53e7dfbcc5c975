"""`--dry-run`: everything short of the first step, in seconds, with no weights and no network.

The recipe is validated, the model built on the meta device from its config, the policy resolved, the first batch shown
with its targets, and memory and time estimated. The plan goes to stdout.
"""

from __future__ import annotations

import json
import math
import os
import shlex
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from torch import nn

from milora_data.command import amount, as_typed
from milora_data.errors import UserError
from milora_data.templates import OWN
from milora_data.tokens import share_template
from milora_vl import models
from milora_vl.composing.whole import whole_weights
from milora_vl.config import Recipe, RecipeError
from milora_vl.image_tokens import image_tokens
from milora_vl.policy import Target
from milora_vl.towers import TOWERS, find_towers
from milora_vl.training import (
    bases,
    build,
    evaluation,
    first_batch,
    packages,
    rates,
    resuming,
    run_data,
    run_folder,
    settings,
    training_args,
)
from milora_vl.training.arguments import PROG, Request
from milora_vl.training.batching import Batching
from milora_vl.training.dry_run_cost import MIX665K, costs_of
from milora_vl.training.screen import COLUMNS, Screen, policy_rows, trainable_text, trained_sizes


def show(request: Request) -> int:
    """Print the plan of a run. UserError for whatever would stop it; returns 0.

    With --format json the plan goes to stderr, and what a program wants of it to stdout.
    """
    screen = Screen(sys.stdout if request.format == "human" else sys.stderr)
    chosen = settings.resolve(request)
    _require_fit(request, chosen.recipe)
    packages.check(chosen.recipe.train, chosen.recipe.quantization, chosen.recipe.attn_implementation)
    config = bases.config_for(chosen.recipe)
    base = meta_model(config)
    recipe = build.rules_for(chosen.recipe, base, implicit=chosen.implicit_policy)
    targets = build.targets_of(recipe, base)
    path = Path(request.output_dir) if request.output_dir else run_folder.default_path(recipe, datetime.now())
    resumed, processes = resuming.Resumed(run_folder.choose(path, request.resume), request.resume), num_devices(request)
    warnings = resumed.compare(chosen.recipe, implicit_policy=chosen.implicit_policy, processes=processes)
    train, more_warnings = training_args.prepared(recipe)
    warnings += more_warnings + rates.warnings(targets, train, method=request.edits.method)
    targets = rates.in_force(targets, train)
    for line in [*chosen.notes, *(f"warning: {warning}" for warning in [*chosen.warnings, *warnings])]:
        screen.say(line)
    parts = bases.parts_of(recipe)
    screen.say(f"model  {parts.describe() if parts else recipe.model}, {count(base):,} parameters")
    screen.say(f"run    {path} (not created)\n")
    policy(screen, base, targets)
    problems = _missing(recipe)  # the rest of the plan is worth seeing; they are raised at the end
    try:
        counts, num_records = data(screen, recipe, config, base)
    except UserError as error:
        problems.append(error)
        counts, num_records = _assumed(screen, recipe, "cannot be read"), None
    rows = math.ceil((num_records or 1) / counts.records)
    batching = _batching(train, None if recipe.data.streaming else rows, processes)
    screen.say(f"\nbatch  {batching.describe()}")
    has_steps = recipe.data.streaming or num_records is not None
    unknown = "not known: the data cannot be read" if recipe.data.path else "not known without data"
    screen.say(f"steps  {batching.describe_steps() if has_steps else unknown}")
    costs = costs_of(
        train, config, base, targets, counts, batching, _packed_bytes(recipe), has_steps=has_steps,
        gpu_memory=request.gpu_memory, is_here=request.devices is None and request.gpu_memory is None,
    )  # fmt: skip
    screen.say("\n".join(costs.lines))
    if problems:
        raise UserError("\n".join(map(str, problems)))
    start = command(request) + ("" if recipe.data.path else _words_for_data(base))
    start += f" {costs.change}" if costs.change else ""
    if batching.num_devices > 1 and request.output_dir is None:
        start += " --output_dir FOLDER"  # processes cannot agree on a name with the time in it
    how = {"": "to start it", None: "to start it where it fits"}.get(costs.change, "to start it so that it fits")
    screen.say(as_typed(f"\n{how}:\n  {start}"))
    if request.format == "json":
        content = {
            "model": recipe.model, "parameters": count(base), **_trained(base, targets), "records": num_records,
            "batch": batching.total, "steps": batching.steps if has_steps else None, "cost": costs.lines,
            "output_dir": str(path), "next": start,
        }  # fmt: skip
        sys.stdout.write(json.dumps(content, ensure_ascii=False) + "\n")
    return 0


def _batching(train: dict[str, Any], num_rows: int | None, devices: int) -> Batching:
    return Batching(
        num_records=num_rows,
        per_device=train.get("per_device_train_batch_size", 8),
        accumulation=train.get("gradient_accumulation_steps", 1),
        num_devices=devices,
        epochs=train.get("num_train_epochs", 3.0),
        max_steps=train.get("max_steps", -1),
        drop_last=train.get("dataloader_drop_last", False),
    )


def _require_fit(request: Request, recipe: Recipe) -> None:
    """Without a policy there is no plan, but data and evaluation have faults of their own: UserError with all."""
    try:
        settings.require_fit(request, recipe)
    except RecipeError as error:
        found = [error, *_missing(recipe), *_faults_of_data(recipe)]
        raise UserError("\n".join(map(str, found))) from None


def _missing(recipe: Recipe) -> list[UserError]:
    """What loading the model, or the evaluation after the training, would stumble over."""
    found = []
    for check in (lambda: bases.check(recipe), lambda: _template(recipe), lambda: evaluation.check(recipe.eval)):
        try:
            check()
        except UserError as error:
            found.append(error)
    return found


def _template(recipe: Recipe) -> None:
    """UserError for a chat template that a tokenizer at hand does not have."""
    if recipe.template == OWN and bases.parts_of(recipe) is None:
        tokenizer = tokenizer_at_hand(recipe.model)
        if tokenizer is not None:
            build.require_template(recipe, tokenizer)


def _faults_of_data(recipe: Recipe) -> list[UserError]:
    if recipe.data.path is None:
        return []
    try:
        run_data.read(recipe.data)
    except UserError as error:
        return [error]
    return []


def _words_for_data(base: nn.Module) -> str:
    return " --data_path DATA.json" + (" --image_folder FOLDER" if find_towers(base).vision is not None else "")


def _trained(base: nn.Module, targets: list[Target]) -> dict[str, Any]:
    sizes = trained_sizes(targets, base)
    rows = [dict(zip(COLUMNS, row, strict=True)) for row in policy_rows(targets, sizes)]
    return {"trained": sum(sizes.values()), "policy": rows}


def _packed_bytes(recipe: Recipe) -> float | None:
    from milora_vl.quantized import bytes_per_number

    if recipe.quantization == "none":
        return None
    return bytes_per_number(recipe.quantization, double_quant=recipe.double_quant)


def meta_model(config: Any) -> nn.Module:
    """The model of a config with shapes alone: no weights, no memory."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    sees = "vision_config" in config.to_dict()
    with whole_weights(), torch.device("meta"):
        return (AutoModelForImageTextToText if sees else AutoModelForCausalLM).from_config(config)


def policy(screen: Screen, base: nn.Module, targets: list[Target]) -> None:
    """The policy table, the PEFT line, and the numbers by kind."""
    towers = find_towers(base)
    trained_towers = {target.tower for target in targets}
    present = {"language": towers.language, "projector": towers.projector, "vision": towers.vision}
    sizes = trained_sizes(targets, base)
    frozen = [t for t in TOWERS if present[t] is not None and t not in trained_towers]
    screen.policy(policy_rows(targets, sizes), frozen)
    adapters = sum(sizes[t.path] for t in targets if t.rank is not None)
    full = sum(sizes.values()) - adapters
    copies = full if adapters else 0  # PEFT keeps the original beside a module that trains in full
    screen.say(trainable_text(adapters + full, count(base) + adapters + copies))
    screen.say(f"adapters {adapters:,}, in full {full:,}")


def data(screen: Screen, recipe: Recipe, config: Any, base: nn.Module) -> tuple[first_batch.Counts, int | None]:
    """Check and show the records, and return what one of a batch takes, and how many there are.

    The number is None where it is not known: no data is named yet, or it is a stream.
    """
    if recipe.data.path is None:
        return _assumed(screen, recipe, "none named yet (--data_path)"), None
    read = run_data.read(recipe.data)
    sees = find_towers(base).vision is not None
    num_tokens = image_tokens(config) if sees else 0
    tokenizer, template = tokenizer_at_hand(recipe.model), recipe.template
    if template == OWN and bases.parts_of(recipe) is not None:
        template = "vicuna_v1"  # which composing gives it
    elif template == OWN and tokenizer is None:
        screen.say("\nthe model's own template comes with its tokenizer, which is not here: counted as vicuna_v1")
        template = "vicuna_v1"
    first = read.train[: recipe.train.get("per_device_train_batch_size", 8)]
    counts = first_batch.count(
        first,
        template=template,
        tokenizer=tokenizer,
        image_tokens=num_tokens,
        max_length=recipe.data.max_length,
    )
    screen.say(f"\ndata   {read.describe()}")
    screen.say(f"first batch: {amount(len(first), 'record')}, {counts.describe()}   (> is learnt, . is only read)")
    for line in first_batch.lines(first, template=template, image_tokens=num_tokens, tokenizer=tokenizer):
        screen.say(line)
    packed = _packed(screen, recipe, counts) if recipe.data.packing else counts
    return packed, None if read.streamed else len(read.train)


def _assumed(screen: Screen, recipe: Recipe, why: str) -> first_batch.Counts:
    """What a record takes where none can be read: about as much as one of LLaVA's mix665k, within --max_length."""
    counts = MIX665K.within(recipe.data.max_length)
    screen.say(f"\ndata   {why}; counts below assume records of {counts.tokens:,} tokens (LLaVA's mix665k)")
    return _packed(screen, recipe, counts) if recipe.data.packing else counts


def _packed(screen: Screen, recipe: Recipe, counts: first_batch.Counts) -> first_batch.Counts:
    """Full rows in the place of records: the real ones are full to a percent or two."""
    rows = counts.packed(2 * recipe.data.max_length)
    screen.say(f"packed into rows of {rows.tokens:,} tokens, ~{rows.records:.3g} records each")
    return rows


def tokenizer_at_hand(name: str) -> Any | None:
    """The model's tokenizer if it is on this machine, else None: nothing is fetched for a dry run."""
    from transformers import AutoProcessor, AutoTokenizer

    if name in ("tiny", "tiny-text"):
        from milora_vl.tiny import tiny_tokenizer

        return tiny_tokenizer()
    source = name if Path(name).is_dir() else models.NAMED_MODELS.get(name, name)
    if name in models.MADE_HERE:
        from milora_vl.smol_llava import folder_of

        source = str(folder_of(name))
    for auto in (AutoProcessor, AutoTokenizer):  # the chat template may be the processor's; of a text model both are
        try:
            found = auto.from_pretrained(source, local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError):
            continue
        tokenizer, pictures = models.split_processor(found)
        if pictures is not None:
            share_template(found)
        return tokenizer
    return None


def count(model: nn.Module) -> int:
    """Parameters of a model, tied ones once."""
    return sum(p.numel() for p in model.parameters())


def num_devices(request: Request) -> int:
    """Devices that are planned for, else those of the launch: what torchrun says, or one."""
    return request.devices or int(os.environ.get("WORLD_SIZE", "1"))


def command(request: Request) -> str:
    """The command line without --dry-run; with torchrun where it was planned for several devices."""
    words, planned = [], ("--dry-run", "--devices", "--gpu-memory", "--format")
    for word, before in zip(request.words, ("", *request.words), strict=False):
        name, is_value = word.replace("_", "-").split("=")[0], not word.startswith("-")
        if name not in planned and not (is_value and before.replace("_", "-") in planned):
            words.append(word)
    return f"{_launcher(request.devices or 1)} {shlex.join(words)}"


def _launcher(devices: int) -> str:
    if devices == 1:
        return PROG
    nodes = devices // 8 if devices > 8 and devices % 8 == 0 else 1
    several = f"--nnodes {nodes} --rdzv_backend c10d --rdzv_endpoint HOST:29500 " if nodes > 1 else ""
    return f"torchrun {several}--nproc_per_node {devices // nodes} -m {PROG.split()[-1]}"
