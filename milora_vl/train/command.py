"""`python -m milora_vl.train`: parse the flags, then dry run, listing or training; close the process group."""

from __future__ import annotations

import atexit
import sys
import time
from collections.abc import Sequence

from milora_vl.common.errors import UserError
from milora_vl.train.recipe import flags
from milora_vl.train.recipe.merge import merge


def main(argv: Sequence[str] | None = None) -> int:
    """Run the action of the command line and return the exit code. Raises UserError for mistakes the user can fix."""
    request = flags.parse(argv)
    if request.action in ("print_recipe", "list_models", "list_recipes"):
        from milora_vl.train.recipe import listings

        if request.problems:
            raise UserError(problems=request.problems)
        return listings.show(request)
    settings = merge(request)
    with settings.places():
        if request.action == "dry_run":
            from milora_vl.train.dry_run import dry_run

            return dry_run.show(settings)
        from milora_vl.train.run import train

        return train(settings)


@atexit.register
def _destroy_process_group() -> None:
    """Close the process group before exit.

    A thread of gloo that still releases the tensors of the last collective when the interpreter ends aborts the
    process, after everything is written: in about one of five short runs of two processes. The pause lets it finish.
    """
    if "torch" not in sys.modules:
        return
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        time.sleep(0.5)
        dist.destroy_process_group()
