"""TextVQA as LLaVA scores it: apply the M4C normaliser to both sides, and extract the question from the prompt.

Follows llava/eval/m4c_evaluator.py and llava/eval/eval_textvqa.py.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache

from milora_eval.rules.vqa import clean, leave_one_out, normalise_words, strip_punctuation


@lru_cache(maxsize=1 << 18)
def m4c_normalise(text: str) -> str:
    """Return M4C's normal form of an answer: like VQA's, but commas, question marks and `'s` are processed first.

    >>> m4c_normalise("Dog's"), m4c_normalise("red,blue")
    ("dog 's", 'redblue')
    """
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return normalise_words(strip_punctuation(clean(text)))


def textvqa_accuracy(text: str, references: Sequence[str]) -> float:
    """Return the accuracy of one answer against ten references. Raises ValueError for another number."""
    if len(references) != 10:
        raise ValueError(f"TextVQA's rule needs 10 references, got {len(references)}")
    return leave_one_out(m4c_normalise(text), [m4c_normalise(reference) for reference in references])


def question_of(prompt: str) -> str:
    """Return the lower-case question of a prompt; together with the image id it is the key of the annotation.

    Raises ValueError for a prompt with another format, for example with a newline inside an OCR token.
    """
    lines = prompt.split("\n")
    if prompt.startswith("OCR tokens: "):
        found = re.search(r"Question: (.*?) Short answer:", prompt, re.DOTALL)
        if found is not None:
            return found.group(1).lower()
    elif "Reference OCR token: " in prompt and len(lines) == 3:
        return lines[1 if prompt.startswith("Reference OCR token:") else 0].lower()
    elif len(lines) == 2:
        return lines[0].lower()
    raise ValueError(f"not a TextVQA prompt of LLaVA: {prompt!r}")
