"""Generate answers: select the items, run the model, store the answers and resume."""
