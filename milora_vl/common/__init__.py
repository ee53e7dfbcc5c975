"""What every package stands on: errors, secrets, YAML and JSON of unknown origin, strict models, atomic files."""
