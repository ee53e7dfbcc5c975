"""`python -m milora_vl.analyze ranks MODEL`: a policy whose ranks follow from the singular values of a model."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from milora_vl.common.cli.command_line import amount, next_step, positive
from milora_vl.common.cli.flags import Command, option, shared
from milora_vl.common.errors import Key, Problem, UserError, at_flag, with_problems

COMMAND = Command(
    "milora_vl.analyze ranks",
    "Write a policy whose ranks follow from the singular values of a model.",
    """\
The policy selects the modules; its own ranks do not count. The scale alpha/rank of each module stays.

examples:
  python -m milora_vl.analyze ranks llava-1.5-7b --energy 0.01 --max 256 > policy.yaml
  python -m milora_vl.analyze ranks llava-1.5-7b --budget 20000000 --policy rules.yaml > policy.yaml
  python -m milora_vl.train --model llava-1.5-7b --policy policy.yaml --dry-run
""",
    inputs=(
        option("model", metavar="MODEL", help="name, hub id or folder"),
        (
            option("--energy", type=float, metavar="X", help="largest rank whose minor part holds this share of ‖W‖²"),
            option(
                "--threshold",
                type=float,
                metavar="X",
                help="number of singular values that are at most this share of the largest",
            ),
            option("--budget", type=positive, metavar="N", help="number of trained parameters of all adapters"),
        ),
        option("--policy", metavar="RULES", help="YAML text or file (default: the default policy)"),
    ),
    settings=(
        option("--min", type=positive, default=1, metavar="N", help="smallest rank (default: %(default)s)"),
        option("--max", type=positive, metavar="N", help="largest rank"),
        option("--factor_cache", type=Path, metavar="FOLDER", help="folder that caches the singular values"),
        shared("device"),
    ),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return the exit code. Raises UserError if model, policy and ranks do not fit."""
    options = COMMAND.parse(argv)
    import yaml

    from milora_vl.analyze.weights import open_weights
    from milora_vl.core.policy import Policy
    from milora_vl.core.policy.default import DEFAULT_RULES, without_projector
    from milora_vl.core.policy.ranks import SpectralRank, with_ranks
    from milora_vl.models.devices import device_named

    try:
        rank = SpectralRank(
            energy=options.energy, threshold=options.threshold, budget=options.budget, min=options.min, max=options.max
        )
        with at_flag("--policy"):
            policy = None if options.policy is None else Policy.parse(options.policy)
        weights, device = open_weights(options.model), device_named(options.device)
        if policy is None:
            has_projector = weights.towers.projector is not None
            policy = Policy.parse(DEFAULT_RULES if has_projector else without_projector(DEFAULT_RULES))
        found = with_ranks(
            policy, weights.model, rank, lambda path: weights.matrix(path).to(device),
            cache=options.factor_cache, is_shown=True,
        )  # fmt: skip
    except UserError as error:
        raise with_problems(error, [_at_its_flag(problem) for problem in error.problems]) from None
    sys.stdout.write(yaml.safe_dump(found.to_list(), sort_keys=False, default_flow_style=None, width=1000))
    ranks = [rule.rank for rule in found.rules[len(policy.rules) :] if rule.rank is not None]
    mean = sum(ranks) / len(ranks)
    sys.stderr.write(f"{amount(len(ranks), 'adapter')}: ranks {min(ranks)} to {max(ranks)}, {mean:.1f} on average\n")
    next_step("milora_vl.train", "--model", options.model, "--policy", "POLICY.yaml", "--dry-run")
    return 0


def _at_its_flag(problem: Problem) -> Problem:
    """Return the problem; one of the measure or of its limits is at the flag."""
    if not isinstance(problem.where, Key) or "policy" in problem.where.parts:
        return problem
    return replace(problem, where=f"--{problem.where}" if problem.where.parts else "--min --max")
