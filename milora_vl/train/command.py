"""`python -m milora_vl.train`: fine-tune a model from a recipe, with Hugging Face's, LLaVA's and our own flags."""

from __future__ import annotations

import atexit
import sys
from collections.abc import Sequence

from milora_data.errors import UserError
from milora_vl.recipe import arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Run the action of the command line and return the exit code. Raises UserError for mistakes the user can fix."""
    request = arguments.parse(argv)
    if request.action in ("print_recipe", "list_models", "list_recipes"):
        from milora_vl.recipe import listings

        return listings.show(request)
    if request.action == "dry_run":
        from milora_vl.plan import dry_run

        return dry_run.show(request)
    return train(request)


def train(request: arguments.Request) -> int:
    """Run one training, from the recipe to the report, and return the exit code."""
    from milora_vl.train.run import Run

    job = Run(request)
    job.check_resumed()
    if job.is_done():
        return 0
    job.check_policy()
    job.check_hub()
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
def _destroy_process_group() -> None:
    """Close the process group before exit: gloo's threads sometimes abort an interpreter that ends while they run."""
    if "torch" not in sys.modules:
        return
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
