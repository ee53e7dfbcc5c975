"""Run a script that calls `peft.get_peft_model` with MiLoRA instead of LoRA:

python -m milora_vl.interop.replace [--in MODULE] script.py ARGUMENTS...
"""

from __future__ import annotations

import argparse
import runpy
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

from milora_vl.common.cli.console import run
from milora_vl.common.cli.parser import Command, option
from milora_vl.common.errors import UserError, beside


@contextmanager
def get_peft_model_replaced(*modules: str, protect: float | None = None) -> Iterator[None]:
    """Inside this context `get_peft_model` creates the same LoRA as MiLoRA.

    The function is replaced in `peft`, for every later `from peft import get_peft_model`, and in `modules`, which have
    imported it already. Modules, rank, alpha and dropout come from the LoraConfig of the calling code.
    `PeftModel.from_pretrained(..., is_trainable=True)` restores the difference and the anchor of a MiLoRA adapter.
    `protect` is the share of the input energy of ordinary text that updates leave alone, by default 0.95: the base
    model writes the texts, and A is fixed off their inputs. With 0 the base model writes nothing, and the LoRA is the
    paper's MiLoRA.

    >>> import peft, torch
    >>> with get_peft_model_replaced(protect=0):
    ...     model = peft.get_peft_model(
    ...         torch.nn.Sequential(torch.nn.Linear(4, 4)), peft.LoraConfig(r=2, target_modules=["0"])
    ...     )
    >>> model.milora_targets[0].method
    'milora'
    """
    import peft

    from milora_vl.common.compat.peft import calls_replaced
    from milora_vl.interop.peft_calls import replacement, restoring_loader  # before: they need the stock functions

    if protect is not None and not 0 <= protect < 1:
        raise UserError(f"expected a share from 0 to below 1, got {protect}", where="protect", hint="for example  0.95")
    namespaces = [peft, *(import_module(name) for name in modules)]
    loader = restoring_loader(peft.PeftModel.from_pretrained)
    with calls_replaced(namespaces, replacement(peft.get_peft_model, protect), loader):
        yield


def launch(script: Path, arguments: Sequence[str]) -> None:
    if not script.is_file():
        raise UserError("no such script", where=str(script), hint=beside(script))
    sys.argv = [str(script), *arguments]
    sys.path.insert(0, str(script.resolve().parent))
    runpy.run_path(str(script), run_name="__main__")


def launcher(name: str, about: str, example: str) -> Command:
    return Command(
        name,
        about,
        f"examples:\n  python -m {name} {example}\n",
        inputs=(option("script", type=Path, metavar="script.py", help="the script; its own arguments follow it"),),
        settings=(
            option(
                "--protect",
                type=float,
                metavar="SHARE",
                help="share of the input energy of ordinary text that updates leave alone (default: 0.95)",
            ),
            option(
                "--in",
                dest="modules",
                action="append",
                default=[],
                metavar="MODULE",
                help="module that has imported get_peft_model already; may be repeated",
            ),
        ),
    )


def parse(command: Command, argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    arguments = list(sys.argv[1:] if argv is None else argv)
    split = next((i for i, argument in enumerate(arguments) if argument.endswith(".py")), len(arguments))
    return command.parse(arguments[: split + 1]), arguments[split + 1 :]


COMMAND = launcher(
    "milora_vl.interop.replace", "Run a script with MiLoRA as its LoRA.", "train.py --learning_rate 2e-4"
)


def main(argv: Sequence[str] | None = None) -> int:
    chosen, arguments = parse(COMMAND, argv)
    with get_peft_model_replaced(*chosen.modules, protect=chosen.protect):
        launch(chosen.script, arguments)
    return 0


if __name__ == "__main__":
    run(main)
