"""Open questions about MiLoRA, each a file in llava_recipes/studies: many small trainings of one task, compared."""
