"""GGUF files for llama.cpp and Ollama, by llama.cpp's own scripts (`--llama_cpp FOLDER`), and Ollama's Modelfile.

The scripts know every family, but convert_hf_to_gguf.py converts no LLaVA with a CLIP tower: of its class it knows
Pixtral alone. `write_pictures` writes its file of pictures (mmproj), a CLIP tower and a projector of two layers.
llama.cpp computes the tower up to `clip.vision.feature_layer`, leaves out the class token, and applies the projector.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from milora_data.encode.templates import BOS, EOS, OWN, TEMPLATES, Template, template_name
from milora_vl.common.errors import UserError
from milora_vl.export.base_model import ExportBase, copy_processor, save_model
from milora_vl.export.request import OutType
from milora_vl.models.loading import split_processor, weights_folder

MODEL_SCRIPT = "convert_hf_to_gguf.py"
LORA_SCRIPT = "convert_lora_to_gguf.py"
SENTENCEPIECE = "tokenizer.model"
PROJECTOR = {"linear_1": "mm.0", "linear_2": "mm.2"}  # layers of a LLaVA's projector
_LAST_LINES = 6


def require_scripts(llama_cpp: str | Path | None) -> Path:
    get = "get it:  git clone https://github.com/ggml-org/llama.cpp   then add  --llama_cpp llama.cpp"
    if llama_cpp is None:
        raise UserError("GGUF files are written by the scripts of llama.cpp", where="--llama_cpp", hint=get)
    folder = Path(llama_cpp)
    missing = [name for name in (MODEL_SCRIPT, LORA_SCRIPT) if not (folder / name).is_file()]
    if missing:
        message = f"{folder} has no {missing[0]}: expected a copy of llama.cpp's repository"
        raise UserError(message, where="--llama_cpp", hint=get)
    return folder


def write_model_folder(model: Any, folder: Path, base: ExportBase, processor: Path) -> None:
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
    llama_cpp: Path, model_folder: Path, model: nn.Module, base: ExportBase, output: Path, outtype: OutType
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
    arguments = ("--outtype", outtype, "--outfile", output, "--base", base_config, adapter)
    run_script(llama_cpp / LORA_SCRIPT, *arguments)


def run_script(script: Path, *arguments: str | Path, may_lack: bool = False) -> str | None:
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
    system = f"{{{{ if .System }}}}{form.frame[0]}{{{{ .System }}}}{form.frame[1]}{{{{ end }}}}"
    before, after = form.user
    asked = before + (system if form.system_in_question else "") + "{{ .Prompt }}" + after
    # BOS and EOS belong to the tokenizer; Ollama adds them.
    text = ("" if form.system_in_question else system) + asked + form.assistant + "{{ .Response }}" + form.answer[1]
    return (text + form.closing).replace(EOS, "").replace(BOS, "")


def has_clip_tower(config: Any) -> bool:
    return bool(config.model_type == "llava" and config.vision_config.model_type == "clip_vision_model")


def why_no_pictures(config: Any) -> str | None:
    """Return why llama.cpp cannot read the pictures of this LLaVA; None if it can, and for other families."""
    if config.model_type != "llava" or config.vision_config.model_type == "pixtral":
        return None
    vision = config.vision_config
    if vision.model_type != "clip_vision_model":
        return f"llama.cpp reads a LLaVA with a CLIP tower; this one has {vision.model_type}"
    read = (config.projector_hidden_act, config.vision_feature_select_strategy) == ("gelu", "default")
    if not read or not isinstance(config.vision_feature_layer, int) or vision.hidden_act not in ("quick_gelu", "gelu"):
        return (
            "llama.cpp reads one layer of a tower with quick_gelu or gelu, without the class token, and a projector "
            f"with gelu; this one has {config.vision_feature_layer}, {vision.hidden_act}, "
            f"{config.vision_feature_select_strategy} and {config.projector_hidden_act}"
        )
    return None


def require_gguf() -> None:
    if find_spec("gguf") is None:
        message = "the file for the pictures needs the package gguf, which is not installed"
        raise UserError(message, code="package-missing", where="--to", hint="pip install gguf")


def write_pictures(path: Path, config: Any, state: Mapping[str, Tensor], image_processor: Any, outtype: str) -> None:
    """Write the mmproj file of a LLaVA; `state` is the state dict of the whole model, `outtype` f32 or f16."""
    import gguf

    vision, layer = config.vision_config, config.vision_feature_layer
    writer = gguf.GGUFWriter(path, "clip")
    writer.add_type("mmproj")
    writer.add_clip_has_vision_encoder(True)
    writer.add_bool("clip.has_text_encoder", False)
    writer.add_bool("clip.has_llava_projector", True)
    writer.add_clip_projector_type("mlp")
    writer.add_vision_image_size(vision.image_size)
    writer.add_vision_patch_size(vision.patch_size)
    writer.add_vision_embedding_length(vision.hidden_size)
    writer.add_vision_feed_forward_length(vision.intermediate_size)
    writer.add_vision_head_count(vision.num_attention_heads)
    writer.add_vision_attention_layernorm_eps(vision.layer_norm_eps)
    writer.add_vision_block_count(vision.num_hidden_layers)
    writer.add_vision_projection_dim(config.get_text_config().hidden_size)
    writer.add_array("clip.vision.feature_layer", [layer % (vision.num_hidden_layers + 1)])
    writer.add_string("clip.vision.mm_patch_merge_type", "flat")
    writer.add_vision_image_mean([float(x) for x in image_processor.image_mean])
    writer.add_vision_image_std([float(x) for x in image_processor.image_std])
    if vision.hidden_act == "gelu":
        writer.add_vision_use_gelu(True)
    for name, tensor in _tensors(state, vision.num_hidden_layers).items():
        is_half = outtype == "f16" and tensor.dim() > 1  # vectors stay float32
        writer.add_tensor(name, tensor.detach().float().numpy().astype(np.float16 if is_half else np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _tensors(state: Mapping[str, Tensor], blocks: int) -> dict[str, Tensor]:
    """Return the tensors by name in GGUF; the norm behind the last layer is not used, and left out."""
    import gguf

    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.MMPROJ, blocks)
    tensors = {}
    for full_name, tensor in state.items():
        name = full_name.removeprefix("model.")
        if name.startswith("multi_modal_projector."):
            _, layer, kind = name.split(".")
            tensors[f"{PROJECTOR[layer]}.{kind}"] = tensor
        elif name.startswith("vision_tower.") and "post_layernorm" not in name and "position_ids" not in name:
            inside = name.removeprefix("vision_tower.").removeprefix("vision_model.")
            known = table.get_name(f"vision_tower.vision_model.{inside}", try_suffixes=(".weight", ".bias"))
            assert known is not None, f"{name} is no weight of a CLIP tower"
            tensors[known] = tensor
    return tensors
