"""GGUF files for llama.cpp and Ollama, by llama.cpp's own scripts (`--llama_cpp FOLDER`), and Ollama's Modelfile.

The scripts know every family. The pictures of a LLaVA with a CLIP tower, which they do not convert, are written by
clip_pictures.py.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from milora_data.encode.templates import BOS, EOS, OWN, TEMPLATES, Template, template_name
from milora_vl.common.errors import UserError
from milora_vl.export.base import Base, copy_processor, save_model
from milora_vl.export.clip_pictures import has_clip_tower, why_no_pictures, write_pictures
from milora_vl.export.request import OutType
from milora_vl.models.loading import split_processor, weights_folder

MODEL_SCRIPT = "convert_hf_to_gguf.py"
LORA_SCRIPT = "convert_lora_to_gguf.py"
SENTENCEPIECE = "tokenizer.model"
_LAST_LINES = 6


def require_scripts(llama_cpp: str | Path | None) -> Path:
    """Return the folder of llama.cpp. Raises UserError without one, or if it does not contain the scripts."""
    get = "get it:  git clone https://github.com/ggml-org/llama.cpp   then add  --llama_cpp llama.cpp"
    if llama_cpp is None:
        raise UserError(
            "GGUF files are written by the scripts of llama.cpp", code="flag-required", where="--llama_cpp", hint=get
        )
    folder = Path(llama_cpp)
    missing = [name for name in (MODEL_SCRIPT, LORA_SCRIPT) if not (folder / name).is_file()]
    if missing:
        raise UserError(
            f"{folder} has no {missing[0]}: expected a copy of llama.cpp's repository",
            code="path-missing",
            where="--llama_cpp",
            hint=get,
        )
    return folder


def write_model_folder(model: Any, folder: Path, base: Base, processor: Path) -> None:
    """Write a model for the script: weights, and the processor of `processor` (a run folder), else of the base.

    Raises UserError for a tokenizer that would split texts differently after the conversion.
    """
    _name_language_model(model.config)
    save_model(model, folder)
    copy_processor(processor, folder, base)
    source = weights_folder(base.name)
    if source is not None and (source / SENTENCEPIECE).is_file():
        shutil.copyfile(source / SENTENCEPIECE, folder / SENTENCEPIECE)
    tokenizer = folder / "tokenizer.json"
    if (folder / SENTENCEPIECE).is_file() or not tokenizer.is_file():
        return
    if json.loads(tokenizer.read_text(encoding="utf-8"))["model"].get("byte_fallback"):
        raise UserError(
            f"the tokenizer of the base model has no {SENTENCEPIECE}; without it, {MODEL_SCRIPT} writes equal scores "
            "for all tokens, and llama.cpp splits texts differently",
            code="export-llama-cpp",
            where=base.name,
            hint=f"copy {SENTENCEPIECE} of the original language model into the folder of the base model",
        )


def _name_language_model(config: Any) -> None:
    """Name the class of a LLaVA's language model in its config: without the name, the script takes it for a Llama."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    if config.model_type in ("llava", "llava_next") and not config.text_config.architectures:
        classes: Any = MODEL_FOR_CAUSAL_LM_MAPPING
        config.text_config.architectures = [classes[type(config.text_config)].__name__]


def convert_model(
    llama_cpp: Path, model_folder: Path, model: nn.Module, base: Base, output: Path, outtype: OutType
) -> list[str]:
    """Write OUTPUT-TYPE.gguf and, for a model of pictures, mmproj-TYPE.gguf next to it. Return the names of the files.

    `model` is the model in `model_folder`. A note says why there is no file for the pictures.
    """
    file = output.with_name(f"{output.name}-{outtype}.gguf")
    run_script(llama_cpp / MODEL_SCRIPT, "--outtype", outtype, "--outfile", file, model_folder)
    config: Any = model.config
    if "vision_config" not in config.to_dict():
        return [file.name]
    kind: OutType = "f32" if outtype == "f32" else "f16"  # llama.cpp reads kernels of convolutions as f16 or f32
    pictures = file.with_name(f"mmproj-{kind}.gguf")
    reason = why_no_pictures(config)
    if reason is None and has_clip_tower(config):
        _, image_processor = split_processor(base.processor())
        write_pictures(pictures, config, model.state_dict(), image_processor, kind)
    elif reason is None:
        arguments = ("--mmproj", "--outtype", kind, "--outfile", pictures, model_folder)
        reason = run_script(llama_cpp / MODEL_SCRIPT, *arguments, may_lack=True)
    if reason is not None:
        sys.stderr.write(f"note: only the language model is written: {reason}\n")
        return [file.name]
    return [file.name, pictures.name]


def convert_lora(llama_cpp: Path, adapter: Path, base_config: Path, output: Path, outtype: OutType) -> None:
    """Write a stock PEFT adapter as a GGUF LoRA; `base_config` is a folder with config.json of its base model."""
    arguments = ("--outtype", outtype, "--outfile", output, "--base", base_config, adapter)
    run_script(llama_cpp / LORA_SCRIPT, *arguments)


def run_script(script: Path, *arguments: str | Path, may_lack: bool = False) -> str | None:
    """Run a script of llama.cpp with this Python; with `may_lack`, return its message for an unsupported model.

    Raises UserError with the last lines of its output if it fails.
    """
    sys.stderr.write(f"running {script.name}\n")
    command = [sys.executable, str(script), *map(str, arguments)]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8", errors="replace", check=False
    )
    if done.returncode == 0:
        return None
    lines = [line for line in done.stdout.splitlines() if line.strip()][-_LAST_LINES:]
    if may_lack and lines and lines[-1].endswith("is not supported"):
        return f"{script.name} says: {lines[-1]}"
    raise UserError(
        f"failed with exit code {done.returncode}; its last lines:\n" + "\n".join(f"  {line}" for line in lines),
        code="export-llama-cpp",
        where=str(script),
        hint="update llama.cpp and install the requirements of its script, or use  --to merged",
        exit_code=1,
    )


def modelfile(files: Sequence[str], template: str, adapter: str | None = None) -> str:
    """Return the text of a Modelfile for GGUF files in the same folder, with the prompt format of the training.

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
