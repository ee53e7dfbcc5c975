"""Generate answers: select the items, ask the model, store the answers and resume."""
