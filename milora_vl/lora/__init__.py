"""The adapter on top of stock PEFT: layer classes, PeftModel, milora.json, checks against the base model."""
