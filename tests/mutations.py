"""Break the core on purpose, one place at a time: the tests of the area must fail. `make mutations` runs all.

Each row names a file, a text that occurs there once, its replacement, the behaviour that is then lost, and the tests
that must notice. The packages are copied, so the checkout is never changed. A break that no test notices (it survives)
means that a test is missing: then this program exits with 1. It also does so if a text no longer occurs exactly once.

    python tests/mutations.py                      # all, one after the other
    python tests/mutations.py losses encode        # those whose file or behaviour contains one of the words
    python tests/mutations.py --jobs 2 --list
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from support import programs

ROOT = Path(__file__).resolve().parents[1]
COPIED = (
    "milora_vl",
    "llava_recipes",
    "data_tools",
    "eval",
    "tests",
    "docs",
    "benchmarks",
    "pyproject.toml",
    "README.md",
)


@dataclass(frozen=True, slots=True)
class Mutation:
    """A break of one place: `file` is relative to the root, `tests` are paths below tests/ (a file or a folder)."""

    file: str
    old: str
    new: str
    behaviour: str
    tests: tuple[str, ...]


SVD = "milora_vl/svd/decomposition.py"
ENCODE = "data_tools/milora_data/encode/labels.py"
BATCHES = "data_tools/milora_data/batches/rows.py"
COLLATE = "data_tools/milora_data/batches/collate.py"
LOSSES = "milora_vl/models/losses.py"
TRAINER = "milora_vl/train/trainer.py"
CHECKPOINTS = "milora_vl/adapter/checkpoints.py"
RESOLVE = "milora_vl/policy/resolve.py"
MEASURE = "milora_vl/forgetting/measure.py"
PROTECTION = "milora_vl/adapter/protection.py"
PROCESSOR_COLLATE = "data_tools/milora_data/batches/processor_collate.py"

MUTATIONS = (
    # Singular triplets.
    Mutation(
        SVD,
        "torch.arange(count - rank, count,",
        "torch.arange(count - rank - 1, count - 1,",
        "the minor part is the last components",
        ("svd/test_svd.py",),
    ),
    Mutation(
        SVD,
        "keepdim=True)) < 0, -1.0, 1.0)",
        "keepdim=True)) < 0, 1.0, 1.0)",
        "the signs of the triplets are fixed",
        ("svd",),
    ),
    Mutation(
        SVD,
        "S = (factors.S * scale).contiguous()",
        "S = factors.S.contiguous()",
        "weights beyond the range of float32 squares keep their singular values",
        ("svd",),
    ),
    Mutation(
        "milora_vl/svd/cholesky.py",
        "column.diagonal().sub_(shift)",
        "column.diagonal().sub_(min(shift, 0.0))",
        "a search proves that it has missed no component",
        ("svd/test_svd_search.py",),
    ),
    # Initial factors.
    Mutation(
        "milora_vl/svd/factors.py",
        "root = (self.S / scaling).sqrt()",
        "root = self.S.sqrt()",
        "s B0 A0 is the chosen part of the weight for every alpha",
        ("lora/test_initialize.py",),
    ),
    Mutation(
        "milora_vl/factors/initialize.py",
        'salt = seed if target.part == "random" else 0',
        "salt = target.seed",
        "modules of equal shape draw different random components",
        ("lora/test_initialize.py",),
    ),
    Mutation(
        "milora_vl/factors/initialize.py",
        "factors.S.clamp(min=floor)",
        "factors.S.clamp(max=floor)",
        "sigma: floor raises small singular values",
        ("lora/test_initialize.py",),
    ),
    # Layers and adapter files.
    Mutation(
        "milora_vl/adapter/layers.py",
        "torch.cat([(anchor + delta).to(dtype), delta.to(dtype)], dim=1)",
        "torch.cat([anchor.to(dtype), delta.to(dtype)], dim=1)",
        "the saved B is [B0 + E, E]",
        ("lora/test_halves.py",),
    ),
    Mutation(
        "milora_vl/adapter/layers.py",
        "_rows(grad[..., : len(delta)]).T",
        "_rows(grad[..., len(delta) :]).T",
        "D gets its own gradient",
        ("lora/test_products.py",),
    ),
    Mutation(
        "milora_vl/adapter/layers.py",
        "_rows(first + second)",
        "_rows(first)",
        "E gets the gradient of both halves",
        ("lora/test_products.py",),
    ),
    Mutation(
        "milora_vl/adapter/install.py",
        "pairs[1] = E, lossless(B0, dtype)",
        "pass",
        "a reload gives B0 of a float32 base bit for bit",
        ("lora/test_adapter_io.py",),
    ),
    Mutation(
        "milora_vl/adapter/install.py",
        "read = split if version > 1 else split_1",
        "read = split",
        "adapters of format version 1 load",
        ("lora/test_version_1.py",),
    ),
    Mutation(
        "milora_vl/adapter/base_check.py",
        "if distances[path] > 1)",
        "if distances[path] > 1e9)",
        "an adapter refuses another base model",
        ("lora/test_base_check.py",),
    ),
    Mutation(
        "milora_vl/adapter/sidecar.py",
        "expected = target.rank * (2 if target.has_anchor else 1)",
        "expected = rank",
        "weights and milora.json of different saves are refused",
        ("lora/test_sidecar.py", "lora/test_adapter_io.py"),
    ),
    Mutation(
        "milora_vl/adapter/residual.py",
        "weight.copy_(W - minor)",
        "weight.copy_(W)",
        "the residual form takes the trained part out of the base weight",
        ("lora/test_residual.py",),
    ),
    # Policy.
    Mutation(
        RESOLVE,
        '(growth**0.5 if fields.get("rslora") else growth)',
        "growth",
        "rsLoRA keeps its scaling when a later rule changes the rank",
        ("policy",),
    ),
    Mutation(
        RESOLVE,
        "self.fields |= named",
        "self.fields = {**named, **self.fields}",
        "a later rule overrides an earlier one",
        ("policy/test_resolve.py",),
    ),
    Mutation(
        RESOLVE,
        'return [t for t in targets if not any(t.path.startswith(f"{path}.") for path in full)]',
        "return targets",
        "modules inside one that trains in full are no targets of their own",
        ("policy/test_resolve.py", "lora/test_whole_module.py"),
    ),
    # Encoding and its masks.
    Mutation(
        ENCODE,
        "labels += [IGNORE] * len(context) + target",
        "labels += context + target",
        "questions are not learned (byte-level tokenizers)",
        ("data/test_encode.py",),
    ),
    Mutation(
        ENCODE,
        "labels[first:last] = ids[first:last]",
        "labels[first : last - 1] = ids[first : last - 1]",
        "the end of an answer is learned (SentencePiece)",
        ("data/test_encode.py",),
    ),
    Mutation(
        ENCODE,
        "if picture[1] <= end]",
        "if picture[0] < end]",
        "max_length cuts no picture in two",
        ("data/test_encode.py",),
    ),
    Mutation(
        "data_tools/milora_data/encode/templates.py",
        "turn.text + after.replace(EOS, eos), supervised=True)",
        'turn.text + after.replace(EOS, ""), supervised=True)',
        "an answer of vicuna_v1 ends with </s>",
        ("data/test_templates.py", "data/test_encode.py"),
    ),
    # Batches.
    Mutation(
        BATCHES,
        "attention_mask[number, : sum(row.lengths)] = 1",
        "attention_mask[number, : len(row.input_ids)] = 1",
        "the plain picture of a batch of text is hidden from attention",
        ("data/test_collate.py",),
    ),
    Mutation(
        BATCHES,
        "for label in (IGNORE, *row.labels[1:])",
        "for label in row.labels",
        "no packed record predicts the first token of the next",
        ("data/test_pack.py", "data/test_collate_layouts.py", "data/test_collate.py"),
    ),
    Mutation(
        BATCHES,
        "torch.cat([torch.arange(length) for length in lengths])",
        "torch.arange(input_ids.shape[1])",
        "positions restart with each packed record",
        ("data/test_pack.py", "data/test_collate_layouts.py", "data/test_collate.py"),
    ),
    Mutation(
        COLLATE,
        "encoded.input_ids.count(self.image_token_id), sum(counts[: encoded.num_images])",
        "0, 0",
        "a text that holds the picture token is refused",
        ("data/test_collate.py", "data/test_collate_layouts.py"),
    ),
    Mutation(
        "data_tools/milora_data/batches/pack.py",
        "place = bisect_right(sizes, space // more) - 1",
        "place = bisect_right(sizes, 2 * space // more) - 1",
        "no packed row is longer than its capacity",
        ("data/test_pack.py",),
    ),
    # Losses and steps.
    Mutation(
        LOSSES,
        "targets = labels[rows, columns + 1].split(sizes)",
        "targets = labels[rows, columns].split(sizes)",
        "a position predicts the next token",
        ("train/test_losses.py",),
    ),
    Mutation(
        LOSSES,
        "*(None if g is None else g * grads[0] for g in grad_head)",
        "*grad_head",
        "the gradient of a trained head is divided as the loss is",
        ("train/test_losses.py",),
    ),
    Mutation(
        LOSSES,
        "return [(count + number) // pieces for number in range(pieces)]",
        "return [count // pieces for _ in range(pieces)]",
        "no supervised position is left out of the chunks",
        ("train/test_losses.py",),
    ),
    Mutation(
        TRAINER,
        "(max(num_tokens, 1) if num_items_in_batch is None else num_items_in_batch)",
        "max(num_tokens, 1)",
        "accumulated batches weigh tokens, not batches",
        ("train/test_train.py",),
    ),
    Mutation(
        TRAINER,
        'output.metrics[f"{metric_key_prefix}_loss"] = total / max(count, 1)',
        "pass",
        "the loss on held-out records is a mean over tokens",
        ("train/test_trainer.py", "train/test_evaluation.py", "train/test_train.py"),
    ),
    Mutation(
        TRAINER,
        "with torch.random.fork_rng():",
        "if True:",
        "an evaluation does not change later dropout",
        ("train/test_train.py", "train/test_resumed.py"),
    ),
    Mutation(
        "milora_vl/adapter/parameter_groups.py",
        "rate = learning_rate if target.learning_rate is None else target.learning_rate",
        "rate = learning_rate",
        "a rule has its own learning rate",
        ("train/test_param_groups.py", "train/test_rates.py"),
    ),
    # Resuming.
    Mutation(
        CHECKPOINTS,
        "return sorted(folders, key=step_of)",
        "return sorted(folders)",
        "checkpoint-10 is newer than checkpoint-9",
        ("train/test_checkpoints.py",),
    ),
    Mutation(
        CHECKPOINTS,
        "return size < 8 + length + max(ends, default=0)",
        "return False",
        "a truncated checkpoint is not resumed",
        ("train/test_checkpoints.py",),
    ),
    Mutation(
        "milora_vl/plan/resuming.py",
        "if any(change.is_refused for change in differences):",
        "if False:",
        "a resumed run refuses other settings",
        ("train/test_resume_table.py", "train/test_resumed.py"),
    ),
    Mutation(
        "milora_vl/plan/resuming.py",
        "if before == count and self.environment",
        "if before == count or self.environment",
        "a resumed run refuses other records",
        ("train/test_resumed.py",),
    ),
    # Scores.
    Mutation(
        "eval/milora_eval/rules/anls.py",
        "return 0.0 if similarity < THRESHOLD else similarity",
        "return similarity",
        "ANLS below 0.5 is 0",
        ("eval/test_eval_answers.py", "eval/test_eval_vectors.py", "eval/test_eval_benchmarks.py"),
    ),
    Mutation(
        "eval/milora_eval/rules/vqa.py",
        "own, other = min(1.0, (matches - 1) / 3), min(1.0, matches / 3)",
        "own = other = min(1.0, matches / 3)",
        "VQA accuracy leaves one annotator out",
        ("eval/test_eval_vectors.py", "eval/test_eval_benchmarks.py"),
    ),
    Mutation(
        "eval/milora_eval/rules/pope.py",
        'words = text.split(".")[0]',
        "words = text",
        "POPE reads the first sentence",
        ("eval/test_eval_vectors.py", "eval/test_eval_benchmarks.py"),
    ),
    Mutation(
        "eval/milora_eval/rules/chartqa.py",
        "if predicted is not None and true:",
        "if predicted is not None and true is not None and true != 1:",
        "ChartQA compares 0 as text",
        ("eval/test_eval_vectors.py", "eval/test_eval_benchmarks.py"),
    ),
    Mutation(
        "eval/milora_eval/stats.py",
        "crossed = math.fsum(each**2 - square for each, square in zip(sums.flat, squares.flat, strict=True))",
        "crossed = 0.0",
        "standard errors are clustered by picture",
        ("eval/test_eval_stats.py",),
    ),
    # Protected inputs.
    Mutation(
        PROTECTION,
        "return factor.detach() - self.inside(factor, axis)",
        "return factor.detach()",
        "anchors start outside of the protected directions",
        ("lora/test_protect.py", "calibration/test_protected_inputs.py"),
    ),
    Mutation(
        PROTECTION,
        "factor.sub_(share * self.inside(factor, axis))",
        "pass",
        "every step removes the protected directions",
        ("lora/test_protect.py", "calibration/test_protected_inputs.py"),
    ),
    Mutation(
        "milora_vl/adapter/projection_hooks.py",
        "protected.is_kept = id(protected) in projected",
        "protected.is_kept = True",
        "a step of an optimizer that protects nothing is noticed",
        ("lora/test_protect.py",),
    ),
    Mutation(
        "milora_vl/calibration/bases.py",
        "count = min(int((held < share).sum()) + 1, len(held), limit or len(held))",
        "count = min(int((held < share).sum()), len(held), limit or len(held))",
        "the protected directions hold the wanted share",
        ("calibration",),
    ),
    Mutation(
        "milora_vl/calibration/positions.py",
        "return real & ~is_picture, real & is_picture",
        "return torch.ones_like(real) & ~is_picture, torch.ones_like(real) & is_picture",
        "padding does not count in a calibration",
        ("calibration",),
    ),
    Mutation(
        "milora_vl/adapter/layers.py",
        "joined.T, alpha=scaling)",
        "joined.T)",
        "the update that is added to W x is scaled",
        ("lora/test_adapted_linear.py",),
    ),
    Mutation(
        "milora_vl/adapter/layers.py",
        "is_ours and not any(hooks)",
        "is_ours",
        "a hook on lora_B sees the update alone",
        ("lora/test_adapted_linear.py",),
    ),
    Mutation(
        "milora_vl/train/shared_prefix.py",
        ".cumprod(0).sum()) - 1",
        ".cumprod(0).sum())",
        "no label of a row is predicted from another row",
        ("train/test_shared_prefix.py",),
    ),
    Mutation(
        "milora_vl/svd/cholesky.py",
        "G[:a, a:b] = G[a:b, :a].T",
        "pass",
        "the sum of inputs is symmetric",
        ("svd/test_svd_parts.py",),
    ),
    Mutation(
        "milora_vl/calibration/activations.py",
        "(held if number % HELD_OUT == 0 or is_last else fit).append(batch)",
        "fit.append(batch)",
        "the share is checked on text that the calibration did not see",
        ("calibration",),
    ),
    # The collator of all families.
    Mutation(
        PROCESSOR_COLLATE,
        "                if at <= begin < end:\n                    yield at, begin\n                    at = close\n",
        "                pass\n",
        "no token of a picture is learned",
        ("data/test_processor_collate.py",),
    ),
    Mutation(
        PROCESSOR_COLLATE,
        "images = sample.images[: self.inputs.num_placeholders(text)]",
        "images = sample.images",
        "a record that max_length cuts keeps the pictures of its text, and no other",
        ("data/test_processor_collate.py",),
    ),
    Mutation(
        "data_tools/milora_data/encode/picture_template.py",
        "ranges.append((start, places[last][1] + (ends.end() if ends else 0)))",
        "ranges.append((start, places[last][1]))",
        "the token that ends an answer is learned (all families)",
        ("data/test_processor_collate.py",),
    ),
    Mutation(
        "data_tools/milora_data/batches/processor_inputs.py",
        "return not (bos and text.startswith(bos))",
        "return True",
        "a template that writes the BOS gets no second one",
        ("data/test_processor_collate.py",),
    ),
    # Plan, processes, secrets.
    Mutation(
        "milora_vl/plan/launch.py",
        'return "full_shard" if str(settings["reshard_after_forward"]).lower() == "true" else "shard_grad_op"',
        'return "full_shard"',
        "the plan of shard_grad_op counts gathered weights",
        ("plan",),
    ),
    Mutation(
        "milora_vl/plan/run_lock.py",
        "raise in_use(folder, holder) from None",
        "return",
        "two trainings cannot write into one folder",
        ("train/test_run_lock.py",),
    ),
    Mutation(
        "milora_vl/base/secrets.py",
        "text = text.replace(secret, HIDDEN)",
        "pass",
        "secrets of the environment are not printed",
        ("robust/test_secrets.py",),
    ),
    Mutation(
        "eval/milora_eval/answers/identity.py",
        "turns, pictures, *_early_end(benchmark, item)])",
        "turns, pictures])",
        "an answer that ended early is not reused for another rule",
        ("eval/test_eval_decided.py", "eval/test_eval_identity.py"),
    ),
    # Forgetting.
    Mutation(
        MEASURE,
        "-log_p.exp() * log, 0.0)",
        "-log.exp() * log, 0.0)",
        "forgetting is a cross-entropy with the base model's predictions",
        ("forgetting/test_forgetting.py",),
    ),
    Mutation(
        MEASURE,
        "with without():",
        "if True:",
        "the base model is measured without the adapter",
        ("forgetting/test_forgetting.py",),
    ),
    Mutation(
        MEASURE,
        "math.sqrt(count / (count - 1) *",
        "math.sqrt(",
        "standard errors of forgetting count documents",
        ("forgetting/test_forgetting.py",),
    ),
    # Export.
    Mutation(
        "milora_vl/export/recompress.py",
        "_square(torch.cat([B, -B1], dim=1), torch.cat([A, A1]))",
        "_square(torch.cat([B, B1], dim=1), torch.cat([A, A1]))",
        "an export to a lower rank names its error",
        ("export/test_export.py",),
    ),
    Mutation(
        "milora_vl/adapter/apply.py",
        "merged = model.merge_and_unload()",
        "merged = model.unload()",
        "merge puts the change into the weights",
        ("lora/test_adapter.py", "export/test_export.py"),
    ),
    Mutation(
        "milora_vl/export/base.py",
        "dtype = torch.promote_types(dtype, saved)",
        "pass",
        "a merged model is rounded once",
        ("export/test_export.py",),
    ),
)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the tests said of one mutation: `caught` is None if its text does not occur exactly once."""

    mutation: Mutation
    caught: bool | None
    seconds: float
    printed: str

    def __str__(self) -> str:
        word = {True: "caught", False: "SURVIVED", None: "NOT ONCE"}[self.caught]
        return f"{word:<9} {self.seconds:5.0f} s  {self.mutation.file}: {self.mutation.behaviour}\n{self.printed}"


def copy_of_the_tree(folder: Path) -> None:
    """Copy what the tests need; the copy is no git repository."""
    for name in COPIED:
        source, target = ROOT / name, folder / name
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
        else:
            shutil.copy(source, target)


def tried(mutation: Mutation, folder: Path) -> Outcome:
    """Break the copy, run the tests that must notice, and repair it."""
    file, started = folder / mutation.file, time.monotonic()
    text = file.read_text(encoding="utf-8")
    if text.count(mutation.old) != 1:
        return Outcome(mutation, None, 0.0, f"          found {text.count(mutation.old)} times: {mutation.old}\n")
    file.write_text(text.replace(mutation.old, mutation.new), encoding="utf-8")
    try:
        code, printed = pytest_in(folder, mutation.tests)
    finally:
        file.write_text(text, encoding="utf-8")
    if code not in (0, 1):  # no test ran: a path is wrong, or the break is a syntax error
        return Outcome(mutation, None, time.monotonic() - started, printed)
    failed = [line for line in printed.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return Outcome(
        mutation, code == 1, time.monotonic() - started, "".join(f"          {row[:150]}\n" for row in failed)
    )


def pytest_in(folder: Path, tests: Sequence[str]) -> tuple[int, str]:
    """Run tests of a copy until the first failure; return the exit code and what was printed."""
    paths = os.pathsep.join(str(folder / name) for name in ("", "data_tools", "eval"))  # for programs that tests start
    options = ["-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", "--no-header", "--tb=no"]
    words = ["pytest", *options, "-o", "pythonpath=tests . data_tools eval", *(f"tests/{name}" for name in tests)]
    done = programs.run(
        words, cwd=folder, env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}, together=True
    )
    return done.returncode, done.stdout


def chosen(words: Sequence[str]) -> list[Mutation]:
    return [row for row in MUTATIONS if not words or any(word in f"{row.file} {row.behaviour}" for word in words)]


def main(argv: Sequence[str]) -> int:
    """Run the chosen mutations; return 1 if one of them survives or does not apply."""
    parser = argparse.ArgumentParser(description="Break the core, one place at a time: the tests must fail.")
    parser.add_argument("words", nargs="*", help="only mutations whose file or behaviour contains one of these words")
    parser.add_argument("--jobs", type=int, default=1, help="mutations at the same time (default: 1)")
    parser.add_argument("--list", action="store_true", help="only print the behaviours")
    options = parser.parse_args(argv)
    mutations = chosen(options.words)
    if options.list:
        print("\n".join(f"{row.file}: {row.behaviour}" for row in mutations))
        return 0
    with tempfile.TemporaryDirectory() as temporary, ThreadPoolExecutor(options.jobs) as pool:
        free = [Path(temporary) / str(number) for number in range(options.jobs)]
        for folder in free:
            copy_of_the_tree(folder)

        def run(mutation: Mutation) -> Outcome:
            folder = free.pop()
            try:
                outcome = tried(mutation, folder)
            finally:
                free.append(folder)
            print(outcome, end="", flush=True)
            return outcome

        outcomes = list(pool.map(run, mutations))
    caught = sum(outcome.caught is True for outcome in outcomes)
    print(f"{caught} of {len(outcomes)} caught")
    return 0 if caught == len(outcomes) > 0 else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
