"""`--dry-run`: everything short of the first step, in seconds, with no weights and no network.

The recipe is validated, the model built on the meta device from its config, the policy resolved, the first batch shown
with its targets, and memory and time estimated. The plan goes to stdout.
"""

from __future__ import annotations

import json
import math
import shlex
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

from torch import nn

from milora_data.command import as_typed
from milora_data.errors import UserError
from milora_data.templates import OWN
from milora_vl.models.image_tokens import image_tokens
from milora_vl.models.loading import meta_model
from milora_vl.models.names import MADE_HERE, NAMED_MODELS
from milora_vl.models.quantized import bytes_per_number
from milora_vl.models.smol_llava import folder_of
from milora_vl.plan import evaluation, first_batch, requirements, run_data, run_folder, training_args
from milora_vl.plan.batching import Batching
from milora_vl.plan.cost import MIX665K, costs_of
from milora_vl.plan.screen import COLUMNS, Screen, policy_rows, trainable_text, trained_sizes
from milora_vl.policy import Target
from milora_vl.recipe import base_model, settings
from milora_vl.recipe.arguments import PROG, Request
from milora_vl.recipe.on_model import rules_for, targets_of
from milora_vl.recipe.schema import Recipe, RecipeError
from milora_vl.tiny import tiny_tokenizer
from milora_vl.towers import TOWERS, find_towers


def show(request: Request) -> int:
    """Print the plan of a run. UserError for whatever would stop it; returns 0.

    With --format json the plan goes to stderr, and what a program wants of it to stdout.
    """
    screen = Screen(sys.stdout if request.format == "human" else sys.stderr)
    chosen = settings.resolve(request)
    try:
        settings.require_fit(request, chosen.recipe)
    except RecipeError as error:  # without a policy there is no plan, but data and evaluation have faults of their own
        found = [error, *_missing(chosen.recipe), *_faults_of_data(chosen.recipe)]
        raise UserError(problems=[problem for e in found for problem in e.problems], source=error.source) from None
    requirements.check(chosen.recipe.train, chosen.recipe.quantization, chosen.recipe.attn_implementation)
    config = base_model.config_for(chosen.recipe)
    base = meta_model(config)
    recipe = rules_for(chosen.recipe, base, implicit=chosen.implicit_policy)
    targets = targets_of(recipe, base)
    path = Path(request.output_dir) if request.output_dir else run_folder.default_path(recipe, datetime.now())
    run_folder.choose(path, request.resume)
    train, warnings = training_args.prepared(recipe)
    for line in [*chosen.notes, *(f"warning: {warning}" for warning in [*chosen.warnings, *warnings])]:
        screen.say(line)
    parts = base_model.parts_of(recipe)
    screen.say(f"model  {parts.describe() if parts else recipe.model}, {count(base):,} parameters")
    screen.say(f"run    {path} (not created)\n")
    policy(screen, base, targets)
    counts, num_records = None, None
    problems = _missing(recipe)  # the rest of the plan is worth seeing; they are raised at the end
    try:
        counts, num_records = data(screen, recipe, config, base)
    except UserError as error:
        problems.append(error)
    rows = math.ceil((num_records or 1) / (counts.records if counts else 1))
    batching = _batching(train, None if recipe.data.streaming else rows, request.devices or num_devices())
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
        raise UserError(problems=[problem for error in problems for problem in error.problems])
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


def _missing(recipe: Recipe) -> list[UserError]:
    """What loading the model, or the evaluation after the training, would stumble over."""
    found = []
    for check in (lambda: base_model.check(recipe), lambda: evaluation.check(recipe.eval)):
        try:
            check()
        except UserError as error:
            found.append(error)
    return found


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

    if recipe.quantization == "none":
        return None
    return bytes_per_number(recipe.quantization, double_quant=recipe.double_quant)


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


def data(screen: Screen, recipe: Recipe, config: Any, base: nn.Module) -> tuple[first_batch.Counts | None, int | None]:
    """Check and show the records, and return what one of a batch takes, and how many there are.

    None for what is not known: where no data is named yet, and how many a stream has.
    """
    if recipe.data.path is None:
        screen.say("\ndata   none named yet (--data_path); counts below assume records as in LLaVA's mix665k")
        return (_packed(screen, recipe, MIX665K) if recipe.data.packing else None), None
    read = run_data.read(recipe.data)
    sees = find_towers(base).vision is not None
    num_tokens = image_tokens(config) if sees else 0
    tokenizer, template = tokenizer_at_hand(recipe.model), recipe.template
    if tokenizer is None and template == OWN:
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
    screen.say(f"first batch: {len(first)} records, {counts.describe()}   (> is learnt, . is only read)")
    for line in first_batch.lines(first, template=template, image_tokens=num_tokens, tokenizer=tokenizer):
        screen.say(line)
    packed = _packed(screen, recipe, counts) if recipe.data.packing else counts
    return packed, None if read.streamed else len(read.train)


def _packed(screen: Screen, recipe: Recipe, counts: first_batch.Counts) -> first_batch.Counts:
    """Full rows in the place of records: the real ones are full to a percent or two."""
    rows = counts.packed(2 * recipe.data.max_length)
    screen.say(f"packed into rows of {rows.tokens:,} tokens, ~{rows.records:.3g} records each")
    return rows


def tokenizer_at_hand(name: str) -> Any | None:
    """The model's tokenizer if it is on this machine, else None: nothing is fetched for a dry run."""
    from transformers import AutoTokenizer

    if name in ("tiny", "tiny-text"):
        return tiny_tokenizer()
    source = name if Path(name).is_dir() else NAMED_MODELS.get(name, name)
    if name in MADE_HERE:
        source = str(folder_of(name))
    try:
        return AutoTokenizer.from_pretrained(source, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError):
        return None


def count(model: nn.Module) -> int:
    """Parameters of a model, tied ones once."""
    return sum(p.numel() for p in model.parameters())


def num_devices() -> int:
    """Devices of the launch: what torchrun says, else one."""
    import os

    return int(os.environ.get("WORLD_SIZE", "1"))


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
