"""Protected inputs: the input directions of each layer that ordinary text and pictures use, found by calibration.

`activations` runs the model and sums C = E[x x'] per layer input, `bases` takes the first eigenvectors V of C.
`adapter/fixed_a.py` chooses A off them.
Related work: LoRA-Null (arXiv:2503.02659), SC-LoRA (arXiv:2505.23724), CorDA (arXiv:2406.05223).
"""

VERSION = 9  # increase it if equal settings can give other directions

# The slow parts of a start, in their order; their progress bars have these names.
PARTS = TEXTS, CAPTIONS, INPUTS, FACTORS = (
    "writing calibration texts",
    "describing calibration pictures",
    "finding protected inputs",
    "decomposing weights",
)
