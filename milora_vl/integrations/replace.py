"""Any script that calls `peft.get_peft_model`, run with MiLoRA in its place:

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

from milora_data.command import amount, parser, run
from milora_data.errors import UserError

if TYPE_CHECKING:
    from milora_vl.svd import Part

PARTS, FORMS = ("minor", "principal", "random"), ("anchored", "residual")


@contextmanager
def get_peft_model_replaced(*modules: str, part: Part = "minor", form: str = "anchored") -> Iterator[None]:
    """While this is open, `get_peft_model` makes the same LoRA with MiLoRA's start and anchor.

    It is replaced in `peft`, which reaches every later `from peft import get_peft_model`, and in the named modules,
    which have imported it already. Modules, rank, alpha and dropout stay those of the code's own LoraConfig.
    An adapter of ours that `PeftModel.from_pretrained(..., is_trainable=True)` loads to go on gets its halves back.

    >>> import peft, torch
    >>> with get_peft_model_replaced():
    ...     model = peft.get_peft_model(
    ...         torch.nn.Sequential(torch.nn.Linear(4, 4)), peft.LoraConfig(r=2, target_modules=["0"])
    ...     )
    >>> model.milora_targets[0].method
    'milora'
    """
    import peft

    from milora_vl.reinit import reinit_peft  # before: our own code takes the stock function from peft

    stock = peft.get_peft_model
    places = [peft, *(import_module(name) for name in modules)]
    before = [place.__dict__["get_peft_model"] for place in places]
    for place in places:
        place.__dict__["get_peft_model"] = _maker(stock, lambda model: reinit_peft(model, part, form))  # type: ignore[arg-type]
    try:
        with patch.object(peft.PeftModel, "from_pretrained", staticmethod(_loader(peft.PeftModel.from_pretrained))):
            yield
    finally:
        for place, original in zip(places, before, strict=True):
            place.__dict__["get_peft_model"] = original


def _maker(stock: Callable[..., Any], start: Callable[[Any], Any]) -> Callable[..., Any]:
    def get_peft_model(model: Any, peft_config: Any, *args: Any, **kwargs: Any) -> Any:
        """PEFT's function, then MiLoRA's start. Another adapter than a LoRA is made as it is, with a line on stderr."""
        from peft import LoraConfig

        made = stock(model, peft_config, *args, **kwargs)
        if not isinstance(peft_config, LoraConfig):
            sys.stderr.write(f"milora: left as it is, {type(peft_config).__name__} is no LoRA\n")
            return made
        _keep_language_alone(made)
        try:
            tuned = start(made)
        except ValueError as error:
            raise UserError(f"MiLoRA cannot start this LoRA\n{error}") from error
        method = tuned.milora_targets[0].method
        sys.stderr.write(f"milora: method {method} on {amount(len(tuned.milora_report), 'module')}\n")
        return tuned

    return get_peft_model


def _loader(stock: Callable[..., Any]) -> Callable[..., Any]:
    def from_pretrained(
        model: Any, model_id: Any, adapter_name: str = "default", is_trainable: bool = False, *args: Any, **kwargs: Any
    ) -> Any:
        """PEFT's method, after which a folder of ours that is to be trained has its trained half and its anchor."""
        from milora_vl.lora.sidecar import FILE_NAME
        from milora_vl.reinit import restore_split

        made = stock(model, model_id, adapter_name, is_trainable, *args, **kwargs)
        if is_trainable and (Path(model_id) / FILE_NAME).is_file():
            made = restore_split(made, model_id)
            sys.stderr.write(f"milora: {model_id} goes on training as the adapter of ours that it is\n")
        return made

    return from_pretrained


def _keep_language_alone(model: Any) -> None:
    """Take back what suffix targets such as q_proj have hit in a CLIP tower (LLaVA issue 1380), and say so."""
    from peft.tuners.lora import LoraLayer

    from milora_vl.towers import find_towers

    base = model.get_base_model()
    towers = find_towers(base)
    hit = [p for p, m in base.named_modules() if isinstance(m, LoraLayer)]
    elsewhere = [path for path in hit if towers.tower_of(path) == "vision"]
    if not elsewhere or len(elsewhere) == len(hit):
        return
    for path in elsewhere:
        parent, _, name = path.rpartition(".")
        layer = base.get_submodule(path)
        setattr(base.get_submodule(parent), name, layer.get_base_layer())
    sys.stderr.write(f"milora: {len(elsewhere):,} modules of the vision tower, hit by their names alone, stay frozen\n")


def launch(script: Path, arguments: Sequence[str]) -> None:
    """Run a script as `python script arguments` would, in this process. UserError where there is none."""
    if not script.is_file():
        raise UserError(f"no script at {script}")
    _warn_of_decay(arguments)
    sys.argv = [str(script), *arguments]
    sys.path.insert(0, str(script.resolve().parent))
    runpy.run_path(str(script), run_name="__main__")


def _warn_of_decay(arguments: Sequence[str]) -> None:
    """Say on stderr what Hugging Face's flag for weight decay does to factors that start from a weight's components."""
    words = [part for argument in arguments for part in argument.split("=", 1)]
    value = dict(pairwise(words)).get("--weight_decay", "0")
    try:
        is_set = float(value) > 0
    except ValueError:
        return  # the script's own parser says so
    if is_set:
        sys.stderr.write(
            f"milora: warning: --weight_decay {value} removes the components that the adapter starts from: it pulls "
            "towards W - s B0 A0, not towards W\n        set --weight_decay 0\n"
        )


def options(prog: str, description: str, example: str, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the launcher's own flags, the script, and what is the script's."""
    parse = parser(prog, description, f"examples:\n  {prog} {example}\n")
    settings = parse.add_argument_group("settings")
    settings.add_argument(
        "--part", choices=PARTS, default="minor", help="which components train (default: %(default)s)"
    )
    settings.add_argument(
        "--form", choices=FORMS, default="anchored", help="residual: W - s B0 A0 takes the base's place"
    )
    settings.add_argument(
        "--in", dest="modules", action="append", default=[], metavar="MODULE",
        help="a module that has imported get_peft_model before; may be repeated",
    )  # fmt: skip
    read = parse.add_argument_group("input")
    read.add_argument("script", type=Path, metavar="script.py", help="what follows it are its own arguments")
    given = list(sys.argv[1:] if argv is None else argv)
    split = next((i for i, word in enumerate(given) if word.endswith(".py")), len(given))
    parsed: argparse.Namespace = parse.parse_args(given[: split + 1])
    parsed.arguments = given[split + 1 :]
    return parsed


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script. Returns the exit code."""
    about, example = "Run a script with MiLoRA as its LoRA.", "train.py --learning_rate 2e-4"
    chosen = options("python -m milora_vl.integrations.replace", about, example, argv)
    with get_peft_model_replaced(*chosen.modules, part=chosen.part, form=chosen.form):
        launch(chosen.script, chosen.arguments)
    return 0


if __name__ == "__main__":
    run(main)
