"""MiLoRA inside the training code of other projects, without changes to that code: see docs/trainers.md.

Trainers that accept a PeftModel (the HF Trainer, TRL) need nothing from this package: pass them the model that
`apply_milora` returns.
"""
