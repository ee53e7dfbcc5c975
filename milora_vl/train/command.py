"""`python -m milora_vl.train`: fine-tune a model by a recipe, with Hugging Face's, LLaVA's and our own flags."""

from __future__ import annotations

import atexit
import sys
from collections.abc import Sequence

from milora_data.errors import UserError
from milora_vl.recipe import arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Do what the command line asks; UserError for what the user can mend. Returns the exit code."""
    request = arguments.parse(argv)
    if request.action in ("print_recipe", "list_models", "list_recipes"):
        from milora_vl.recipe import listings

        return listings.show(request)
    if request.action == "dry_run":
        from milora_vl.plan import dry_run

        return dry_run.show(request)
    return train(request)


def train(request: arguments.Request) -> int:
    """One run, from the recipe to the report."""
    from milora_vl.train.run import Run

    job = Run(request)
    if job.is_done():
        return 0
    job.check_policy()
    job.read_data()
    job.check_evaluation()
    job.load_model()
    job.arrange_data()
    job.apply_policy()
    job.open_folder()
    try:
        job.train()
    except (KeyboardInterrupt, UserError):
        job.describe_unfinished()
        raise
    job.save()
    job.evaluate()
    return job.close()


@atexit.register
def _leave_the_group() -> None:
    """Several processes part in order: gloo's threads now and then abort an interpreter that ends under them."""
    if "torch" not in sys.modules:
        return
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
