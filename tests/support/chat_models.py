"""Tiny models that bring their own chat template, as folders, and the templates of well-known ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from milora_vl.models.tiny import tiny_llama, tiny_llava

# SmolLM2's, which says its own system text where the messages have none; the answers marked as TRL does.
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
# As Qwen3-VL writes tools: a list in the system text, a call in <tool_call>, results of a call in a turn of the user.
TOOLS_MARKED = (
    "{% if tools %}{{ '<|im_start|>system\n' }}{% if messages[0].role == 'system' %}{{ messages[0].content + '\n\n' }}"
    "{% endif %}{{ '# Tools\n<tools>' }}{% for tool in tools %}{{ '\n' + tool | tojson }}{% endfor %}"
    "{{ '\n</tools><|im_end|>\n' }}{% endif %}{% for m in messages %}"
    "{% if m.role == 'system' %}{% if not tools %}{{ '<|im_start|>system\n' + m.content + '<|im_end|>\n' }}{% endif %}"
    "{% elif m.role == 'user' %}{{ '<|im_start|>user\n' + m.content + '<|im_end|>\n' }}"
    "{% elif m.role == 'assistant' %}{{ '<|im_start|>assistant\n' }}{% generation %}{{ m.content }}"
    "{% for call in m.tool_calls %}{% if not loop.first or m.content %}{{ '\n' }}{% endif %}"
    '{{ \'<tool_call>\n{"name": "\' + call.function.name + \'", "arguments": \' }}'
    "{{ call.function.arguments | tojson + '}\n</tool_call>' }}{% endfor %}{{ '<|im_end|>' }}{% endgeneration %}"
    "{{ '\n' }}{% elif m.role == 'tool' %}{% if messages[loop.index0 - 1].role != 'tool' %}{{ '<|im_start|>user' }}"
    "{% endif %}{{ '\n<tool_response>\n' + m.content + '\n</tool_response>' }}"
    "{% if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{ '<|im_end|>\n' }}{% endif %}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TOOLS = TOOLS_MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", "")
# As Mistral's: nothing asks for an answer, a call has a name for its result, and `</s>` ends an answer.
MISTRAL_TOOLS = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'user' %}{% if tools and loop.first %}[AVAILABLE_TOOLS] {{ tools | tojson }}"
    "[/AVAILABLE_TOOLS]{% endif %}{{ '[INST] ' + m.content + '[/INST]' }}"
    "{% elif m.tool_calls %}[TOOL_CALLS] [{% for call in m.tool_calls %}{{ call.function | tojson }}"
    "{% if not loop.last %}, {% endif %}{% endfor %}]{{ eos_token }}"
    "{% elif m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}"
    "{% elif m.role == 'tool' %}{{ '[TOOL_RESULTS] {\"content\": ' + m.content | tojson + ', \"call_id\": \"' }}"
    "{{ m.tool_call_id + '\"}[/TOOL_RESULTS]' }}{% endif %}{% endfor %}"
)
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
