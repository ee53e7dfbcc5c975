"""Run a script that calls `peft.get_peft_model` with MiLoRA instead of LoRA:

python -m milora_vl.integrations.replace [--part minor] [--form anchored] [--in MODULE] script.py ARGUMENTS...
"""

from __future__ import annotations

import argparse
import runpy
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from milora_data.command.cli import amount, parser, run
from milora_data.errors import UserError

if TYPE_CHECKING:
    from milora_vl.svd import Part

PARTS, FORMS = ("minor", "principal", "random"), ("anchored", "residual")


@contextmanager
def get_peft_model_replaced(*modules: str, part: Part = "minor", form: str = "anchored") -> Iterator[None]:
    """Inside this context `get_peft_model` creates the same LoRA with MiLoRA's initialization and anchor.

    The function is replaced in `peft`, for every later `from peft import get_peft_model`, and in `modules`, which have
    imported it already. Modules, rank, alpha and dropout come from the LoraConfig of the calling code.
    `PeftModel.from_pretrained(..., is_trainable=True)` restores the trained half and the anchor of a MiLoRA adapter.

    >>> import peft, torch
    >>> with get_peft_model_replaced():
    ...     model = peft.get_peft_model(
    ...         torch.nn.Sequential(torch.nn.Linear(4, 4)), peft.LoraConfig(r=2, target_modules=["0"])
    ...     )
    >>> model.milora_targets[0].method
    'milora'
    """
    import peft

    from milora_vl.reinit import reinit_peft  # import it first: this package needs the stock get_peft_model

    stock = peft.get_peft_model
    namespaces = [peft, *(import_module(name) for name in modules)]
    originals = [namespace.__dict__["get_peft_model"] for namespace in namespaces]
    for namespace in namespaces:
        namespace.__dict__["get_peft_model"] = _replacement(stock, lambda model: reinit_peft(model, part, form))  # type: ignore[arg-type]
    try:
        with patch.object(
            peft.PeftModel, "from_pretrained", staticmethod(_restoring_loader(peft.PeftModel.from_pretrained))
        ):
            yield
    finally:
        for namespace, original in zip(namespaces, originals, strict=True):
            namespace.__dict__["get_peft_model"] = original


def _replacement(stock: Callable[..., Any], reinit: Callable[[Any], Any]) -> Callable[..., Any]:
    def get_peft_model(model: Any, peft_config: Any, *args: Any, **kwargs: Any) -> Any:
        """Call PEFT's function, then initialize the LoRA with MiLoRA. Other adapters than a LoRA are not changed."""
        from peft import LoraConfig

        adapted = stock(model, peft_config, *args, **kwargs)
        if not isinstance(peft_config, LoraConfig):
            sys.stderr.write(f"milora: {type(peft_config).__name__} is not a LoRA and is left unchanged\n")
            return adapted
        _remove_vision_adapters(adapted)
        try:
            tuned = reinit(adapted)
        except UserError:
            raise
        except ValueError as error:
            raise UserError(str(error), code="adapter-unsupported-kind", where="get_peft_model") from error
        method = tuned.milora_targets[0].method
        sys.stderr.write(f"milora: method {method} on {amount(len(tuned.milora_report), 'module')}\n")
        return tuned

    return get_peft_model


def _restoring_loader(stock: Callable[..., Any]) -> Callable[..., Any]:
    def from_pretrained(
        model: Any, model_id: Any, adapter_name: str = "default", is_trainable: bool = False, *args: Any, **kwargs: Any
    ) -> Any:
        """Call PEFT's method, and restore the trained half and the anchor of a MiLoRA adapter that is trainable."""
        from milora_vl.lora.sidecar import FILE_NAME
        from milora_vl.reinit import restore_split

        loaded = stock(model, model_id, adapter_name, is_trainable, *args, **kwargs)
        if is_trainable and (Path(model_id) / FILE_NAME).is_file():
            loaded = restore_split(loaded, model_id)
            sys.stderr.write(f"milora: {model_id} continues training as a MiLoRA adapter\n")
        return loaded

    return from_pretrained


def _remove_vision_adapters(model: Any) -> None:
    """Remove the LoRA from vision modules that suffix targets such as q_proj match by accident (LLaVA issue 1380).

    If PEFT has adapted vision modules alone, that was intended, and they stay.
    """
    from peft.tuners.lora import LoraLayer

    from milora_vl.towers import find_towers

    base = model.get_base_model()
    towers = find_towers(base)
    adapted = [p for p, m in base.named_modules() if isinstance(m, LoraLayer)]
    vision = [path for path in adapted if towers.tower_of(path) == "vision"]
    if not vision or len(vision) == len(adapted):
        return
    for path in vision:
        parent, _, name = path.rpartition(".")
        layer = base.get_submodule(path)
        setattr(base.get_submodule(parent), name, layer.get_base_layer())
    sys.stderr.write(f"milora: {len(vision):,} modules of the vision tower, matched by name only, stay frozen\n")


def launch(script: Path, arguments: Sequence[str]) -> None:
    """Run a script in this process as `python script arguments` does. Raises UserError if the script is missing."""
    if not script.is_file():
        raise UserError("no such script", code="script-missing", where=str(script))
    _warn_of_decay(arguments)
    sys.argv = [str(script), *arguments]
    sys.path.insert(0, str(script.resolve().parent))
    runpy.run_path(str(script), run_name="__main__")


def _warn_of_decay(arguments: Sequence[str]) -> None:
    """Warn on stderr if Hugging Face's flag --weight_decay is above 0."""
    tokens = [part for argument in arguments for part in argument.split("=", 1)]
    value = dict(pairwise(tokens)).get("--weight_decay", "0")
    try:
        is_set = float(value) > 0
    except ValueError:
        return  # the script's own parser reports it
    if is_set:
        sys.stderr.write(
            f"milora: warning: --weight_decay {value} removes the components that the adapter starts from. It pulls "
            "towards W - s B0 A0, not towards W.\n        Set --weight_decay 0\n"
        )


def options(prog: str, description: str, example: str, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the flags of this launcher, the script, and the arguments of the script."""
    parse = parser(prog, description, f"examples:\n  {prog} {example}\n")
    settings = parse.add_argument_group("settings")
    settings.add_argument(
        "--part", choices=PARTS, default="minor", help="which components train (default: %(default)s)"
    )
    settings.add_argument(
        "--form", choices=FORMS, default="anchored", help="residual: W - s B0 A0 replaces the base weight"
    )
    settings.add_argument(
        "--in", dest="modules", action="append", default=[], metavar="MODULE",
        help="module that has imported get_peft_model already; may be repeated",
    )  # fmt: skip
    inputs = parse.add_argument_group("input")
    inputs.add_argument("script", type=Path, metavar="script.py", help="the script; its own arguments follow it")
    arguments = list(sys.argv[1:] if argv is None else argv)
    split = next((i for i, argument in enumerate(arguments) if argument.endswith(".py")), len(arguments))
    parsed: argparse.Namespace = parse.parse_args(arguments[: split + 1])
    parsed.arguments = arguments[split + 1 :]
    return parsed


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script and return the exit code."""
    about, example = "Run a script with MiLoRA as its LoRA.", "train.py --learning_rate 2e-4"
    chosen = options("python -m milora_vl.integrations.replace", about, example, argv)
    with get_peft_model_replaced(*chosen.modules, part=chosen.part, form=chosen.form):
        launch(chosen.script, chosen.arguments)
    return 0


if __name__ == "__main__":
    run(main)
