"""The documented import path of `milora_vl.models.smol_llava`."""

from milora_vl.models.smol_llava import folder_of, language_model, made_folder

__all__ = ["folder_of", "language_model", "made_folder"]
