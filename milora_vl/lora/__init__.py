"""The adapter on top of stock PEFT: layer classes (`layers`), PeftModel (`peft_model`), files and checks."""
