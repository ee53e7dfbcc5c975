"""The demo's data set: questions about OpenMoji pictures."""
