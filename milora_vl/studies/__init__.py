"""Studies of open questions about MiLoRA. Each is a file in llava_recipes/studies: many small trainings of one task."""
