"""OK-VQA, val2014: questions that need outside knowledge, in VQA's file format and with VQAv2's rule (ten answers)."""

from __future__ import annotations

from milora_eval.benchmarks.vqav2 import VQAv2


class OKVQA(VQAv2):
    """Accuracy, overall and by answer type."""

    name = "okvqa"
    files = (
        "OpenEnded_mscoco_val2014_questions.json",
        "mscoco_val2014_annotations.json",
        "val2014|images|.",
    )
    source = "okvqa.allenai.org/download.html and cocodataset.org (val2014)"
