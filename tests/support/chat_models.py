"""Tiny models that bring a chat template of their own, as folders, and the templates of well-known ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from milora_vl.models.tiny import tiny_llama, tiny_llava

# SmolLM2's, which says a system text of its own where the messages have none; the answers marked as TRL does.
MARKED = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM<|im_end|>\n' }}{% endif %}"
    "{% if message['role'] == 'assistant' %}{{ '<|im_start|>assistant\n' }}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SMOLLM2 = MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", "")
# For the tiny models: their tokenizer knows `</s>` alone.
TINY = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
# llava-hf's: pictures and texts in parts, no BOS, and nothing special behind an answer.
LLAVA_HF = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' ' }}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def record(turns: list[tuple[str, str]], images: int = 0) -> dict[str, Any]:
    """Return a LLaVA record of (role, text)."""
    pictures = {"image": [f"{number}.png" for number in range(images)]} if images else {}
    return {"id": "r", **pictures, "conversations": [{"from": role, "value": text} for role, text in turns]}


def write_text_model(folder: Path) -> Path:
    """Write a text model whose tokenizer has the chat template TINY."""
    model, tokenizer = tiny_llama()
    tokenizer.chat_template = TINY
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_picture_model(folder: Path) -> Path:
    """Write a LLaVA whose processor alone has a chat template, LLAVA_HF, in the old file, as llava-hf's have it."""
    model, processor = tiny_llava()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": LLAVA_HF}))
    return folder
