"""The adapter on stock PEFT: layers, files, folders, checkpoints, MiLoRA for code that already called PEFT."""
