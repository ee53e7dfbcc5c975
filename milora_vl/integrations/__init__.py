"""MiLoRA inside other people's training code, with no edit of theirs: see docs/integrations.md.

Trainers that take a PeftModel (the HF Trainer, TRL) need nothing from here: pass them what `apply_milora` returns.
"""
