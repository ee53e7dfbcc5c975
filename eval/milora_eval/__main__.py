"""The command `python -m milora_eval`: run, ls, score, judge, compare, view.

Torch is imported only once a model must be loaded.
"""

from __future__ import annotations

from collections.abc import Sequence

from milora_data.command import parser, run
from milora_eval import command_compare, command_judge, command_ls, command_run, command_score, command_view

COMMANDS = {
    "run": (command_run, "ask a model, score its answers, compare with its base"),
    "ls": (command_ls, "list suites and benchmarks"),
    "score": (command_score, "score stored answers, or another program's predictions, without a model"),
    "judge": (command_judge, "have free answers graded by a model (MM-Vet, LLaVA-Bench)"),
    "compare": (command_compare, "paired differences of two evaluations"),
    "view": (command_view, "one HTML page to browse the answers of one run, or of two"),
}

EXAMPLES = {"run": command_run.EXAMPLES, "score": command_score.EXAMPLES}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one of the commands; returns the exit code."""
    options = parser("python -m milora_eval", "Evaluate vision-language models.", command_run.EXAMPLES)
    commands = options.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (module, about) in COMMANDS.items():
        epilog = EXAMPLES.get(name, "")
        own = commands.add_parser(
            name,
            help=about,
            description=f"{about[0].upper()}{about[1:]}.",
            epilog=epilog,
            formatter_class=options.formatter_class,
            allow_abbrev=False,
        )
        module.add_arguments(own)
    chosen = options.parse_args(argv)
    return COMMANDS[chosen.command][0].main(chosen)


if __name__ == "__main__":
    run(main)
