"""Ollama's Modelfile: the files, the prompt format of the training in Ollama's words, and where an answer ends."""

from __future__ import annotations

from collections.abc import Sequence

from milora_data.encode.templates import BOS, EOS, OWN, TEMPLATES, Template, template_name


def modelfile(files: Sequence[str], template: str, adapter: str | None = None) -> str:
    """Return the text of a Modelfile for GGUF files in the same folder.

    A run with the tokenizer's own chat template has no TEMPLATE here: the GGUF file holds it.
    """
    lines = [f"FROM ./{name}" for name in files] + ([f"ADAPTER ./{adapter}"] if adapter else [])
    if template_name(template) == OWN:
        return "\n".join([*lines, "# the prompt format is the chat template in the GGUF file"]) + "\n"
    form = TEMPLATES[template_name(template)]
    lines.append(f'TEMPLATE """{_template(form)}"""')
    lines += [f'SYSTEM """{form.system}"""'] if form.system else []
    end = form.answer[1].replace(EOS, "").strip()
    lines += [f'PARAMETER stop "{end}"'] if end else []
    return "\n".join(lines) + "\n"


def _template(form: Template) -> str:
    """Return one question and its answer in the language of Go's templates."""
    system = f"{{{{ if .System }}}}{form.frame[0]}{{{{ .System }}}}{form.frame[1]}{{{{ end }}}}"
    before, after = form.user
    asked = before + (system if form.system_in_question else "") + "{{ .Prompt }}" + after
    # BOS and EOS belong to the tokenizer; Ollama adds them.
    text = ("" if form.system_in_question else system) + asked + form.assistant + "{{ .Response }}" + form.answer[1]
    return (text + form.closing).replace(EOS, "").replace(BOS, "")
