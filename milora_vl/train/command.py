"""`python -m milora_vl.train`: fine-tune a model by a recipe, with Hugging Face's, LLaVA's and our own flags."""

from __future__ import annotations

import atexit
import sys
from collections.abc import Sequence

from milora_vl.recipe import arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Do what the command line asks. Returns the exit code; raises UserError for mistakes that the user can fix."""
    request = arguments.parse(argv)
    if request.action in ("print_recipe", "list_models", "list_recipes"):
        from milora_vl.recipe import listings

        return listings.show(request)
    if request.action == "dry_run":
        from milora_vl.plan import dry_run

        return dry_run.show(request)
    from milora_vl.train.run import train

    return train(request)


@atexit.register
def _leave_the_group() -> None:
    """Several processes part in order: gloo's threads now and then abort an interpreter that ends under them."""
    if "torch" not in sys.modules:
        return
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
