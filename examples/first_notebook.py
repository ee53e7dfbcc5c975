# %% [markdown]
# # Teach a model a task, and see what it still knows
#
# This notebook shows a small LLaVA drawn shapes with invented names. It asks before and after the training: about the
# shapes, and about things that have nothing to do with them. On a CPU it takes about ten minutes.

# %%
# !pip install -q -e "..[demo]"    # in a clone of the repository; then remove the first "#"

# %% [markdown]
# **For a 7B on a GPU, change this cell alone**: `MODEL = "llava-1.5-7b"`, `RANK = 128`.

# %%
MODEL, RANK, STEPS = "smol-llava", 64, 60

# %%
import random

import torch
from PIL import Image, ImageDraw
from transformers import Trainer, TrainingArguments

from milora_data import Turn
from milora_vl import apply_milora, calibration_texts, collator_for, load_adapter, load_model, merge, save_adapter
from milora_vl.models.generate import Prompt, generate

is_gpu = torch.cuda.is_available()
place = {"dtype": torch.bfloat16 if is_gpu else None, "device": "cuda" if is_gpu else "cpu"}
model, processor = load_model(MODEL, **place)

# %% [markdown]
# ## The task
# Circles are called *dax*, squares *wug*, triangles *fep*. Sizes, places and colours vary.

# %%
NAMES = {"circle": "dax", "square": "wug", "triangle": "fep"}
COLOURS = ("red", "green", "blue", "orange", "purple")
drawing = random.Random(0)


def draw(shape: str) -> Image.Image:
    picture = Image.new("RGB", (224, 224), "white")
    size, pen = drawing.randint(60, 120), ImageDraw.Draw(picture)
    x, y, colour = drawing.randint(10, 90), drawing.randint(10, 90), drawing.choice(COLOURS)
    if shape == "circle":
        pen.ellipse((x, y, x + size, y + size), fill=colour)
    elif shape == "square":
        pen.rectangle((x, y, x + size, y + size), fill=colour)
    else:
        pen.polygon([(x, y + size), (x + size, y + size), (x + size // 2, y)], fill=colour)
    return picture


QUESTION = "<image>\nWhat is the name of this shape?"
records = []
for number in range(96):
    shape = tuple(NAMES)[number % 3]
    draw(shape).save(f"{number}.png")
    turns = [{"from": "human", "value": QUESTION}, {"from": "gpt", "value": f"It is a {NAMES[shape]}."}]
    records.append({"id": str(number), "image": f"{number}.png", "conversations": turns})
new_shapes = [(shape, draw(shape)) for shape in NAMES for _ in range(4)]  # not in the training
new_shapes[0][1]

# %% [markdown]
# ## Answers before

# %%
GENERAL = ("What is the capital of France?", "How many days are in a week?", "What do bees make?")


def ask(model) -> tuple[list[str], list[str]]:
    """Return the answers about the new shapes, and those to the general questions."""
    shapes = [Prompt((Turn("user", QUESTION),), (picture,)) for _, picture in new_shapes]
    others = [Prompt((Turn("user", question),)) for question in GENERAL]
    replies = generate(model, processor, [*shapes, *others], max_new_tokens=24)
    answers = [str(reply).partition("\n")[0] for reply in replies]  # a small model writes on after its answer
    return answers[: len(shapes)], answers[len(shapes) :]


def num_right(answers: list[str]) -> int:
    return sum(NAMES[shape] in answer for (shape, _), answer in zip(new_shapes, answers, strict=True))


before, general_before = ask(model)
print(f"{num_right(before)} of {len(before)} names are right, for example {before[0]!r}")
print(*general_before, sep="\n")

# %% [markdown]
# ## Train
# The base model writes texts, and the pictures of the task are looked at once: they show which inputs the update must
# leave alone. The language model and the projector get adapters; `milora train` does the same and adds `base_kl`.

# %%
collator = collator_for(model, processor, image_folder=".")
calibration = {"texts": calibration_texts(model), "pictures": [collator([record]) for record in records[:32]]}
rules = [
    {"modules": "language", "method": "milora", "rank": RANK},
    {"modules": "projector", "method": "milora", "rank": RANK // 2},
]
model = apply_milora(model, rules, calibration=calibration, progress=True)
model.print_trainable_parameters()

# %%
arguments = TrainingArguments(
    "notebook-run",
    max_steps=STEPS,
    per_device_train_batch_size=8 if is_gpu else 4,
    learning_rate=2e-4 if is_gpu else 1e-3,  # models below 1 B take higher rates
    remove_unused_columns=False,
    report_to="none",
    save_strategy="no",
    logging_steps=10,
    **({"bf16": True, "gradient_checkpointing": True} if is_gpu else {"dataloader_pin_memory": False}),
)
trainer = Trainer(model, arguments, train_dataset=records, data_collator=collator)
result = trainer.train()

# %% [markdown]
# ## Memory

# %%
trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
frozen = sum(p.numel() * p.element_size() for p in model.parameters() if not p.requires_grad)
print(f"frozen {frozen / 2**20:.0f} MiB; trained, with gradients and Adam's state {4 * trained / 2**20:.0f} MiB")
if is_gpu:
    print(f"peak on the GPU {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")

# %% [markdown]
# ## Answers after, on the task and on what it knew

# %%
after, general_after = ask(model)
print(f"{num_right(after)} of {len(after)} names are right, before {num_right(before)}; for example {after[0]!r}\n")
for question, old, new in zip(GENERAL, general_before, general_after, strict=True):
    print(f"{question}\n  before: {old!r}\n  after:  {new!r}")

# %% [markdown]
# ## Save, merge, chat
# The folder is a stock LoRA of PEFT for the unchanged base. The merged model needs no adapter. Its description of a
# shape is the name too: the training has one question about pictures. `base_kl` keeps more of such answers.

# %%
save_adapter(model, "first-adapter")
merged = merge(load_adapter(load_model(MODEL, **place)[0], "first-adapter"))
print(ask(merged)[0][0])

# %%
# In a terminal:  milora chat --adapter first-adapter --image 0.png "What is the name of this shape?"
asked = Prompt((Turn("user", "<image>\nDescribe this picture."),), (new_shapes[0][1],))
print(generate(merged, processor, [asked], max_new_tokens=32)[0])
