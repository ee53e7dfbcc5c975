"""`--dry-run` (`--devices`, `--gpu-memory`): check and show a run in seconds, without weights and network.

It validates the recipe, builds the model on the meta device from its config, resolves the policy, shows the first batch
with its targets, and estimates memory and time. The plan goes to stdout.
"""

from __future__ import annotations

import io
import json
import math
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from milora_data.batches.record_collator import Countable, RecordCollator
from milora_data.encode.templates import OWN
from milora_data.encode.tokens import share_template
from milora_vl.common.cli.command_line import amount
from milora_vl.common.errors import Problem, UserError, collected
from milora_vl.core.policy import Target
from milora_vl.models.base import Base
from milora_vl.models.loading import split_processor
from milora_vl.models.names import BUILT_IN_MODELS, MADE_IN_MEMORY, hub_id
from milora_vl.models.smol_llava import folder_of
from milora_vl.models.tiny import tiny_tokenizer
from milora_vl.train.dry_run import first_batch
from milora_vl.train.dry_run.cost import MIX665K, Costs, costs_of
from milora_vl.train.plan import eval_section, record_checks, run_data
from milora_vl.train.plan.base import require_usable
from milora_vl.train.plan.batching import Batching
from milora_vl.train.plan.earlier_tasks import read_earlier_records
from milora_vl.train.plan.fit import require_template
from milora_vl.train.plan.plan import Plan, make_plan
from milora_vl.train.plan.screen import COLUMNS, Screen, frozen_towers, policy_rows, trainable_text, trained_sizes
from milora_vl.train.recipe.flags import PROG, Request
from milora_vl.train.recipe.hf_flags import value_of
from milora_vl.train.recipe.layers import RecipeFile, placed
from milora_vl.train.recipe.merge import Settings, merge
from milora_vl.train.recipe.schema import Recipe, RecipeError


@dataclass(frozen=True, slots=True)
class Outlook:
    """What a run will do: its plan, its steps (unknown without data) and its costs."""

    plan: Plan
    num_records: int | None
    batching: Batching
    has_steps: bool
    costs: Costs
    warnings: list[str]


def show(settings: Settings) -> int:
    """Print the plan of a run. Return 0, or 1 if it does not fit --gpu-memory.

    Raises UserError with everything that would stop the run. With --format json the plan goes to stderr and a JSON
    summary to stdout.
    """
    request = settings.request
    screen = Screen(sys.stdout if request.format == "human" else sys.stderr)
    run = work_out(settings, screen)
    _show_next(run, request, screen)
    return 0 if run.costs.fits else 1


def outlook(recipe: Recipe, source: str, output_dir: Path) -> Outlook:
    """Return what a new run of a recipe will do, and print nothing; errors name the recipe by `source`.

    Raises UserError with everything that would stop the run.
    """
    request = Request(
        recipe=source,
        file=RecipeFile(placed(recipe.model_dump(), lambda key: source), source),
        output_dir=str(output_dir),
    )
    settings = merge(request)
    with settings.places():
        return work_out(settings, Screen(io.StringIO()))


def work_out(settings: Settings, screen: Screen) -> Outlook:
    """Show the plan of a run and return it. Raises UserError with everything that would stop the run."""
    plan, request = _plan_or_all_problems(settings), settings.request
    recipe, base, section = plan.recipe, plan.base, plan.section
    warnings = [*plan.warnings, *section.warnings]
    for line in [*settings.notes, *(f"warning: {warning}" for warning in warnings)]:
        screen.say(line)
    model = base.parts.describe() if base.parts else base.name
    adapter = f", with the adapter {recipe.adapter}" if recipe.adapter else ""
    adapter += f", after {recipe.after} ({amount(len(plan.tasks), 'earlier task')})" if plan.tasks else ""
    screen.say(f"model  {model}, {num_parameters(base.meta):,} parameters{adapter}")
    screen.say(f"run    {plan.folder.path} (not created)\n")
    policy(screen, base.meta, plan.targets)
    problems = _missing(recipe, base)  # raised at the end, after the plan is printed
    try:
        counts, num_records = data(screen, recipe, base)
    except UserError as error:
        problems += error.problems
        counts, num_records = _assumed(screen, recipe, "cannot be used"), None
    with collected(problems):
        read_earlier_records(plan.tasks, recipe, screen, are_used=plan.reads_calibration)
    rows = math.ceil((num_records or 1) / counts.records)
    batching = Batching(
        num_records=None if recipe.data.streaming else rows,
        per_device=value_of(section.arguments, "per_device_train_batch_size"),
        accumulation=value_of(section.arguments, "gradient_accumulation_steps"),
        num_devices=num_devices(request),
        epochs=value_of(section.arguments, "num_train_epochs"),
        max_steps=value_of(section.arguments, "max_steps"),
        drop_last=value_of(section.arguments, "dataloader_drop_last"),
        unit="packed row" if recipe.data.packing else "record",
    )
    screen.say(f"\nbatch  {batching.describe()}")
    has_steps = recipe.data.streaming or num_records is not None
    unknown = "unknown: the data cannot be used" if recipe.data.path else "unknown without data"
    screen.say(f"steps  {batching.describe_steps() if has_steps else unknown}")
    costs = costs_of(plan, counts, batching, has_steps=has_steps)
    screen.say("\n".join(costs.lines))
    if problems:
        raise UserError(problems=problems)
    return Outlook(plan, num_records, batching, has_steps, costs, warnings)


def _show_next(run: Outlook, request: Request, screen: Screen) -> None:
    """Show the command that starts the run, and with --format json print the summary."""
    recipe, base, batching, costs = run.plan.recipe, run.plan.base, run.batching, run.costs
    start = command(request) + ("" if recipe.data.path else _words_for_data(base))
    start += f" {costs.change}" if costs.change else ""
    if batching.num_devices > 1 and request.output_dir is None:
        start += " --output_dir FOLDER"  # the default name holds the time, which differs between processes
    how = {"": "to start it", None: "to start it on a device where it fits"}
    title = how.get(costs.change, "to start it so that it fits")
    screen.say(f"\n{title}:\n  {start}")
    if request.format == "json":
        content = {
            "model": recipe.model, "parameters": num_parameters(base.meta), **_trained(base.meta, run.plan.targets),
            "records": run.num_records, "batch": batching.total,
            "steps": batching.steps if run.has_steps else None, "cost": costs.lines, "fits": costs.fits,
            "output_dir": str(run.plan.folder.path), "next": start,
        }  # fmt: skip
        sys.stdout.write(json.dumps(content, ensure_ascii=False) + "\n")


def _plan_or_all_problems(settings: Settings) -> Plan:
    """Make the plan. Raises UserError with all problems, also of data and evaluation, if the rules do not fit."""
    try:
        return make_plan(settings, processes=num_devices(settings.request))
    except RecipeError as error:
        problems, recipe = list(error.problems), settings.recipe
        if not settings.problems:
            with collected(problems):
                eval_section.require_runnable(recipe)
            with collected(problems):
                if recipe.data.path is not None:
                    run_data.read_records(recipe.data)
        raise UserError(problems=problems, source=error.source) from None


def _missing(recipe: Recipe, base: Base) -> list[Problem]:
    """Return problems that would stop loading the model, or the evaluation after training."""
    problems: list[Problem] = []
    try:
        require_usable(recipe, base)
    except UserError as error:
        # The plan of a named model needs only its config; data() says that the processor is not here.
        if not (_is_absent(error) and base.own_pictures):
            problems += error.problems
    with collected(problems):
        if recipe.template == OWN and base.parts is None and not base.own_pictures:
            tokenizer = tokenizer_at_hand(base.name)
            if tokenizer is not None:
                require_template(recipe, tokenizer)
    with collected(problems):
        eval_section.require_runnable(recipe)
    return problems


def _is_absent(error: UserError) -> bool:
    """Return whether the error says that files are not on this machine and the hub does not answer."""
    return error.first.code == "model-not-available"


def _words_for_data(base: Base) -> str:
    return " --data_path DATA.json" + (" --image_folder FOLDER" if base.reads_pictures else "")


def _trained(base: nn.Module, targets: Sequence[Target]) -> dict[str, Any]:
    sizes = trained_sizes(targets, base)
    rows = [dict(zip(COLUMNS, row, strict=True)) for row in policy_rows(targets, sizes, base)]
    return {"trained": sum(sizes.values()), "policy": rows}


def policy(screen: Screen, base: nn.Module, targets: Sequence[Target]) -> None:
    """Show the policy table, PEFT's line, and the numbers of adapter and fully trained parameters."""
    sizes = trained_sizes(targets, base)
    screen.policy(policy_rows(targets, sizes, base), frozen_towers(base, targets))
    adapters = sum(sizes[t.path] for t in targets if t.rank is not None)
    full = sum(sizes.values()) - adapters
    copies = full if adapters else 0  # PEFT keeps the original beside a module that trains in full
    screen.say(trainable_text(adapters + full, num_parameters(base) + adapters + copies))
    screen.say(f"adapters {adapters:,}, in full {full:,}")


def data(screen: Screen, recipe: Recipe, base: Base) -> tuple[first_batch.Counts, int | None]:
    """Check and show the records. Return the tokens per record, and the number of records.

    The number is unknown (None) for a stream, and if no data is named.
    """
    if recipe.data.path is None:
        return _assumed(screen, recipe, "none yet (--data_path)"), None
    read = run_data.read_records(recipe.data)
    first = read.train[: value_of(recipe.train, "per_device_train_batch_size")]
    found = read.describe()
    try:
        collate = _collator(screen, recipe, base)
    except UserError as error:
        if not _is_absent(error):
            raise
        found += f", not checked: the processor of {recipe.model} is not on this machine"
        return _assumed(screen, recipe, found), None if read.streamed else len(read.train)
    counter: Countable
    if collate is None:
        template = "vicuna_v1" if recipe.template == OWN else recipe.template
        counter = first_batch.Estimate(template, base.tokens_of_a_picture, recipe.data.max_length)
    else:
        counter = collate
        record_checks.check(collate, recipe, read.train, read.evaluation or ())
        if recipe.data.bad_images != "raise":  # the run leaves out the others
            first = record_checks.usable(collate, read.train[: record_checks.FIRST])[: len(first)]
    counts = first_batch.count(first, counter, is_exact=collate is not None).within(recipe.data.max_length)
    counts = replace(counts, has_pictures=any(record.images for record in read.train))
    screen.say(f"\ndata   {found}")
    screen.say(f"first batch: {amount(len(first), 'record')}, {counts.describe()}   (> supervised, . not supervised)")
    for line in first_batch.lines(first, counter, base.tokens_of_a_picture):
        screen.say(line)
    packed = _packed(screen, recipe, counts) if recipe.data.packing else counts
    return packed, None if read.streamed else len(read.train)


def _collator(screen: Screen, recipe: Recipe, base: Base) -> RecordCollator[Any] | None:
    """Return the collator of the run; None if the tokenizer of a LLaVA or of a text model is not on this machine."""
    if base.own_pictures:
        return record_checks.collator_of(recipe, base, base.processor)
    tokenizer = tokenizer_at_hand(base.name)
    if recipe.template == OWN and (base.parts is not None or tokenizer is None or not tokenizer.chat_template):
        screen.say("\nno chat template is on this machine for this base: counts below use vicuna_v1")
        recipe = recipe.model_copy(update={"template": "vicuna_v1"})
    return None if tokenizer is None else record_checks.collator_of(recipe, base, tokenizer)


def _assumed(screen: Screen, recipe: Recipe, why: str) -> first_batch.Counts:
    """Return assumed tokens per record (as in LLaVA's mix665k, within --max_length) if no record can be read."""
    counts = MIX665K.within(recipe.data.max_length)
    source = "LLaVA's mix665k" if counts == MIX665K else f"LLaVA's mix665k, cut to --max_length {counts.tokens:,}"
    screen.say(f"\ndata   {why}; counts below assume records of {counts.tokens:,} tokens ({source})")
    return _packed(screen, recipe, counts) if recipe.data.packing else counts


def _packed(screen: Screen, recipe: Recipe, counts: first_batch.Counts) -> first_batch.Counts:
    """Return counts of full rows instead of records; real rows are full to one or two percent."""
    rows = counts.packed(2 * recipe.data.max_length)
    screen.say(f"packed into rows of {rows.tokens:,} tokens, ~{rows.records:.3g} records each")
    return rows


def tokenizer_at_hand(name: str) -> Any | None:
    """Return the tokenizer if it is on this machine, else None: a dry run downloads nothing."""
    from transformers import AutoProcessor, AutoTokenizer

    if name in MADE_IN_MEMORY:
        return tiny_tokenizer()
    source = name if Path(name).is_dir() else hub_id(name)
    if name in BUILT_IN_MODELS:
        source = str(folder_of(name))
    for auto in (AutoProcessor, AutoTokenizer):  # the processor may hold the chat template
        try:
            loaded = auto.from_pretrained(source, local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError):
            continue
        tokenizer, pictures = split_processor(loaded)
        if pictures is not None:
            share_template(loaded)
        return tokenizer
    return None


def num_parameters(model: nn.Module) -> int:
    """Return the number of parameters; tied ones count once."""
    return sum(p.numel() for p in model.parameters())


def num_devices(request: Request) -> int:
    """Return the planned number of devices; by default WORLD_SIZE of the launcher, or one."""
    return request.devices or int(os.environ.get("WORLD_SIZE", "1"))


def command(request: Request) -> str:
    """Return the command line without --dry-run; with torchrun if it plans for several devices."""
    words, planned = [], ("--dry-run", "--devices", "--gpu-memory", "--format")
    for word, before in zip(request.words, ("", *request.words), strict=False):
        name, is_value = word.replace("_", "-").split("=")[0], not word.startswith("-")
        if name not in planned and not (is_value and before.replace("_", "-") in planned):
            words.append(word)
    fewest = 2 if request.overrides.get("train", {}).get("fsdp") else 1  # FSDP2 needs several processes
    return f"{_launcher(max(request.devices or 1, fewest))} {shlex.join(words)}"


def _launcher(devices: int) -> str:
    if devices == 1:
        return PROG
    nodes = devices // 8 if devices > 8 and devices % 8 == 0 else 1
    several = f"--nnodes {nodes} --rdzv_backend c10d --rdzv_endpoint HOST:29500 " if nodes > 1 else ""
    return f"torchrun {several}--nproc_per_node {devices // nodes} -m {PROG.split()[-1]}"
