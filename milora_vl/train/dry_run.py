"""`--dry-run` (`--devices`, `--gpu-memory`): check and show a run in seconds, without weights and network.

It validates the recipe, builds the model on the meta device from its config, resolves the policy, shows the first batch
with its targets, which reveals most data mistakes, and estimates memory and time. The plan goes to stdout.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import Any

from transformers import AutoProcessor, AutoTokenizer

import llava_recipes
from milora_data.batches.record_collator import RecordCollator
from milora_data.encode.templates import OWN
from milora_data.encode.tokens import share_template
from milora_data.records.record import IMAGE, Record
from milora_vl.common.cli.console import amount
from milora_vl.common.cli.screen import Screen
from milora_vl.common.errors import Problem, UserError, collected
from milora_vl.models.base import Base
from milora_vl.models.loading import split_processor
from milora_vl.models.names import BUILT_IN_MODELS, MADE_IN_MEMORY, hub_id
from milora_vl.models.smol_llava import folder_of
from milora_vl.models.tiny import tiny_tokenizer
from milora_vl.train import data, inherit
from milora_vl.train.arguments import value_of
from milora_vl.train.flags import PROG, Request
from milora_vl.train.memory import MIX665K, Costs, Counts, costs_of, num_parameters
from milora_vl.train.merge import Settings
from milora_vl.train.recipe import Recipe
from milora_vl.train.screen import COLUMNS, frozen_towers, policy_rows, show_policy, trainable_line, trained_sizes
from milora_vl.train.setup import (
    Batching,
    Run,
    make_run,
    missing_packages,
    num_devices,
    require_evaluation,
    require_usable,
)

SHOWN, LONGEST = 2, 300  # records of the first batch, characters of a text
PACKED = 20_000  # records whose lengths decide the number of packed rows


def show(settings: Settings) -> int:
    """Print the plan of a run. Return 0, or 1 if it does not fit --gpu-memory.

    Raises UserError with everything that would stop the run.
    """
    screen = Screen(sys.stdout if settings.request.format == "human" else sys.stderr)
    run, request = make_run(settings, is_started=False), settings.request
    recipe, base = run.recipe, run.base
    for line in [*run.notes, *(f"warning: {warning}" for warning in run.warnings)]:
        screen.say(line)
    model = base.parts.describe() if base.parts else base.name
    adapter = f", with the adapter {recipe.adapter}" if recipe.adapter else ""
    adapter += f", after {recipe.after} ({amount(len(run.tasks), 'earlier task')})" if run.tasks else ""
    screen.say(f"model  {model}, {num_parameters(base.meta):,} parameters{adapter}")
    screen.say(f"run    {run.folder.path} (not created)\n")
    _show_policy(screen, run)
    problems = _missing(recipe, base)  # raised at the end, after the plan is printed
    needs = [f"the package {package}, which is not installed: {hint}" for package, _, hint in missing_packages(recipe)]
    try:
        counts, num_records, num_rows = _show_data(screen, run)
    except UserError as error:
        problems += error.problems
        counts, num_records, num_rows = _assumed(screen, recipe, "cannot be used"), None, None
    if request.recipe in llava_recipes.names():  # its own files may be missing
        files = {str(recipe.data.path): "--data_path", str(recipe.projector_weights): "--projector_weights"}
        files = {file: flag for file, flag in files.items() if flag not in request.flags.values()}
        absent = [problem for problem in problems if problem.where in files and not Path(problem.where).exists()]
        needs += [f"{problem.where}, which is not here (or {files[str(problem.where)]} FILE)" for problem in absent]
        problems = [problem for problem in problems if problem not in absent]
    run, note = run.on_records(has_pictures=recipe.data.streaming or counts.has_pictures)
    if note:
        screen.say(note)
    with collected(problems):
        inherit.read_earlier_records(run.tasks, recipe, screen, are_used=run.reads_calibration)
    batching = Batching.of(recipe, num_rows or 1, num_devices(request))
    screen.say(f"\nbatch  {batching.describe()}")
    has_steps = recipe.data.streaming or num_rows is not None
    unknown = "unknown: the data cannot be used" if recipe.data.path else "unknown without data"
    screen.say(f"steps  {batching.describe_steps() if has_steps else unknown}")
    costs = costs_of(run, counts, batching, has_steps=has_steps)
    screen.say("\n".join([*costs.lines, *(f"needs  {need}" for need in needs)]))
    if problems:
        raise UserError(problems=problems)
    title, start = _next(run, request, batching, costs)
    screen.say(f"\n{title}:\n  {start}")
    if request.format == "json":
        sizes = trained_sizes(run.targets, base.meta)
        content = {
            "model": recipe.model, "parameters": num_parameters(base.meta), "trained": sum(sizes.values()),
            "policy": [dict(zip(COLUMNS, row, strict=True)) for row in _policy_rows(run, sizes)],
            "records": num_records, "batch": batching.total, "steps": batching.steps if has_steps else None,
            "cost": costs.lines, "fits": costs.fits, "needs": needs, "output_dir": str(run.folder.path), "next": start,
        }  # fmt: skip
        sys.stdout.write(json.dumps(content, ensure_ascii=False) + "\n")
    return 0 if costs.fits else 1


def _next(run: Run, request: Request, batching: Batching, costs: Costs) -> tuple[str, str]:
    start = command(request)
    if run.recipe.data.path is None:
        start += " --data_path DATA.json" + (" --image_folder FOLDER" if run.base.reads_pictures else "")
    start += f" {costs.change}" if costs.change else ""
    if batching.num_devices > 1 and request.output_dir is None:
        start += " --output_dir FOLDER"  # the default name holds the time, which differs between processes
    how = {"": "to start it", None: "to start it on a device where it fits"}
    return how.get(costs.change, "to start it so that it fits"), start


def _missing(recipe: Recipe, base: Base) -> list[Problem]:
    problems: list[Problem] = []
    try:
        require_usable(recipe, base)
    except UserError as error:
        # The plan of a named model needs only its config; `_show_data` says that the processor is not here.
        if not (_is_absent(error) and base.own_pictures):
            problems += error.problems
    with collected(problems):
        if recipe.data.path is None and not base.own_pictures:
            _collator(recipe, base)  # its template
    with collected(problems):
        require_evaluation(recipe)
    return problems


def _is_absent(error: UserError) -> bool:
    return error.first.code == "model-not-available"


def _policy_rows(run: Run, sizes: dict[str, int]) -> list[tuple[str, ...]]:
    return policy_rows(run.recipe.policy or [], run.targets, sizes, run.base.meta)


def _show_policy(screen: Screen, run: Run) -> None:
    base, targets = run.base.meta, run.targets
    sizes = trained_sizes(targets, base)
    show_policy(screen, _policy_rows(run, sizes), frozen_towers(base, targets))
    adapters = sum(sizes[t.path] for t in targets if t.rank is not None)
    full = sum(sizes.values()) - adapters
    copies = full if adapters else 0  # PEFT keeps the original beside a module that trains in full
    screen.say(trainable_line(adapters + full, num_parameters(base) + adapters + copies))
    screen.say(f"adapters {adapters:,}, in full {full:,}")


def _show_data(screen: Screen, run: Run) -> tuple[Counts, int | None, int | None]:
    """Check and show the records. Return the tokens per record or row, and the numbers of records and of rows.

    The numbers are unknown (None) for a stream, and if no data is named.
    """
    recipe, base = run.recipe, run.base
    if recipe.data.path is None:
        return _assumed(screen, recipe, "none yet (--data_path)"), None, None
    read = data.read_records(recipe.data)
    number = None if read.streamed else len(read.train)
    found = read.describe()
    try:
        collate = _collator(recipe, base)
    except UserError as error:
        if not _is_absent(error):
            raise
        collate = None
    if collate is None:
        counts = _assumed(screen, recipe, f"{found}, not checked: the tokenizer of {recipe.model} is not here")
        return counts, number, None if number is None else max(round(number / counts.records), 1)
    data.check(collate, recipe, read)
    first = list(read.train[: value_of(recipe.train, "per_device_train_batch_size")])
    if recipe.data.bad_images != "raise":  # the run leaves out the others
        first = data.usable(collate, read.train[: data.FIRST])[: len(first)]
    tokens, supervised = (sum(map(count, first)) / len(first) for count in (collate.num_tokens, collate.num_supervised))
    screen.say(f"\ndata   {found}")
    line = f"{tokens:,.0f} tokens per record, {supervised:,.0f} of them supervised"
    screen.say(f"first batch: {amount(len(first), 'record')}, {line}   (> supervised, . not supervised)")
    for line in _first_batch(first, collate, base.tokens_of_a_picture):
        screen.say(line)
    has_pictures = any(record.images for record in read.train)
    if sum(read.with_images) < len(read.train) and collate.hidden_tokens:
        screen.say(f"a batch of texts alone shows a hidden plain picture: {collate.hidden_tokens:,} tokens more")
    counts = Counts(tokens, supervised, has_pictures=has_pictures)
    if not recipe.data.packing or number is None:
        return counts, number, number
    every = -(-number // PACKED)
    sample = read.train[::every]
    lengths = data.lengths(recipe, collate, sample)
    assert lengths is not None
    rows, summary = data.packed(recipe, sample, lengths)
    screen.say(summary if every == 1 else f"about {every} times: {summary}")
    per_row = len(sample) / len(rows)
    packed = Counts(2 * recipe.data.max_length, supervised * per_row, per_row, has_pictures)
    return packed, number, len(rows) * every


def _collator(recipe: Recipe, base: Base) -> RecordCollator[Any] | None:
    """Return the collator of the run; None if the tokenizer of a LLaVA or of a text model is not on this machine."""
    processor = base.processor if base.own_pictures else _tokenizer_at_hand(base.name)
    if processor is None:
        return None
    if recipe.template == OWN and base.parts is not None:  # a composed base has no chat template
        recipe = recipe.model_copy(update={"template": "vicuna_v1"})
    return data.strict_collator(recipe, base, processor)


def _assumed(screen: Screen, recipe: Recipe, why: str) -> Counts:
    """Return assumed tokens per record, as in LLaVA's mix665k, if no record can be counted."""
    longest = recipe.data.max_length
    counts = Counts(min(MIX665K.tokens, longest), min(MIX665K.supervised, longest))
    screen.say(f"\ndata   {why}; counts below assume records of {counts.tokens:,} tokens (LLaVA's mix665k)")
    if not recipe.data.packing:
        return counts
    records = 2 * longest / counts.tokens
    screen.say(f"packed into rows of {2 * longest:,} tokens, about {records:.3g} records each")
    return Counts(2 * longest, counts.supervised * records, records)


def _first_batch(records: Sequence[Record], collate: RecordCollator[Any], image_tokens: int) -> list[str]:
    """Return the first records as text, one line per segment: `>` marks supervised text, `.` other text.

    `image_tokens` is the number of tokens of an image, or 0 where it depends on the image.
    """
    out = []
    for record in records[:SHOWN]:
        out.append(f"{record.source or record.id}  {' '.join(record.images) or '(no image)'}")
        for supervised, pieces in groupby(collate.segments(record), attrgetter("supervised")):
            text = "".join(piece.text for piece in pieces).replace("\n", "\\n")
            text = text.replace(IMAGE, f"<image x {image_tokens}>" if image_tokens else IMAGE)
            more = f" ... ({len(text):,} characters)" if len(text) > LONGEST else ""
            out.append(f"  {'>' if supervised else '.'} {text[:LONGEST]}{more}")
    return out


def _tokenizer_at_hand(name: str) -> Any | None:
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


def command(request: Request) -> str:
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
