"""Studies of open questions about MiLoRA. Each is a file in studies: many small trainings of one task."""
