"""DPO with pictures on TRL's DPOTrainer: our adapter, our collation, any model that `milora_vl.train` takes.

pip install trl
python examples/dpo_trl.py --recipe examples/dpo_trl.yaml --data_path pairs.json --image_folder images --output_dir out

pairs.json is a list of {"images": ["a.jpg"], "prompt": ..., "chosen": ..., "rejected": ...}; docs/data.md has
the other forms. The base model is the reference: TRL switches the adapter off, so it needs no second model.
"""

import argparse
import sys
from pathlib import Path

import torch
from datasets import Dataset
from trl import DPOConfig, DPOTrainer

from milora_data.batches.preferences import PreferenceCollator, pair_of
from milora_data.encode.templates import OWN
from milora_data.formats.jsonfile import read_objects
from milora_vl import apply_milora, load_model, save_adapter
from milora_vl.common.errors import UserError
from milora_vl.models.base import Base
from milora_vl.models.devices import dtype_named
from milora_vl.models.image_tokens import uses_processor
from milora_vl.models.processors import limit_pixels
from milora_vl.train.collators import collator
from milora_vl.train.recipe.schema import Recipe, load


def main() -> None:
    """Train, and save the adapter to the output folder."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--recipe", type=Path, required=True, help="YAML with model, data, policy and train")
    options.add_argument("--model", help="model in place of the recipe's")
    options.add_argument("--data_path", help="pairs: a JSON list or JSON lines")
    options.add_argument("--image_folder", help="folder of the pictures")
    options.add_argument("--output_dir", required=True, help="folder for the adapter and the checkpoints")
    options.add_argument("--beta", type=float, default=0.1, help="DPO's beta: how far the model may move from its base")
    options.add_argument("--max_steps", type=int, help="number of steps in place of the recipe's epochs")
    chosen = options.parse_args()
    try:
        trainer = trainer_of(recipe_of(chosen), chosen)
        trainer.train()
        save_adapter(trainer.model, chosen.output_dir)
    except UserError as error:
        sys.exit(str(error))


def recipe_of(chosen: argparse.Namespace) -> Recipe:
    """Return the recipe with what the command line changes."""
    recipe = load(chosen.recipe)
    data = {"path": chosen.data_path, "image_folder": chosen.image_folder}
    data = {key: value for key, value in data.items() if value is not None}
    model = chosen.model or recipe.model
    return recipe.model_copy(update={"model": model, "data": recipe.data.model_copy(update=data)})


def trainer_of(recipe: Recipe, chosen: argparse.Namespace) -> DPOTrainer:
    """Return TRL's trainer for a recipe."""
    # TRL wants a column "images" in every row; every pair is checked before the model loads.
    pairs = [{"images": [], **value, "id": place} for place, value in read_objects(Path(str(recipe.data.path)))]
    for pair in pairs:
        pair_of(pair, source=f"{recipe.data.path}:{pair['id']}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, processor = load_model(
        recipe.model,
        dtype=None if recipe.dtype == "auto" else dtype_named(recipe.dtype, torch.device(device)),
        device=device,
        quantization=None if recipe.quantization == "none" else recipe.quantization,
    )
    if uses_processor(model.config):
        limit_pixels(processor, recipe.data.min_pixels, recipe.data.max_pixels)
        recipe = recipe.model_copy(update={"template": OWN})  # the processor writes the prompts
    collate = PreferenceCollator(collator(recipe, Base.of(recipe.model, model.config), processor))
    train = dict(recipe.train)
    if chosen.max_steps is not None:
        train["max_steps"] = chosen.max_steps
    if device == "cpu":
        train |= {"use_cpu": True, "bf16": False}
    arguments = DPOConfig(
        output_dir=chosen.output_dir,
        beta=chosen.beta,
        max_length=None,  # the collator cuts to data.max_length, never within a picture
        remove_unused_columns=False,
        **train,
    )
    model = apply_milora(model, recipe.policy)
    trainer = DPOTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list(pairs),
        data_collator=collate,
        processing_class=processor,
    )
    if "ref" in model.peft_config:
        model.delete_adapter("ref")  # TRL's copy of the adapter; without it, TRL switches the adapter off
    return trainer


if __name__ == "__main__":
    main()
