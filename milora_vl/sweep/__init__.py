"""Methods x learning rates x ranks x seeds over one recipe: `python -m milora_vl.sweep`. On top of all packages."""
