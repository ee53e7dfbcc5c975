"""A task that others made, for the first hour: smol-llava learns easy-VQA (Victor Zhou), beside two baselines.

python examples/easy_vqa.py                              # 17 minutes of one CPU core
python examples/easy_vqa.py --max_steps 20               # other arguments go to the training

Its table shows the accuracy on questions of the official test part, beside the most frequent answer to each type of
question. The last line is the published figure of a convolutional network, which trained on all pictures eight times.
"""

import argparse
import sys

from milora_data.easy_vqa import main as create
from milora_eval.__main__ import main as evaluate
from milora_vl.train.command import main as train

PUBLISHED = "93.8 on all test questions: https://victorzhou.com/blog/easy-vqa/, section 8"

options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
options.add_argument("--questions", default="1000", help="number of test questions, a seeded choice (default: 1000)")
chosen, others = options.parse_known_args()
data, run = "data/easy-vqa", "runs/easy-vqa"
test = ["--benchmarks", f"{data}/test.json", "--limit", chosen.questions]
steps = (
    lambda: create(["--output_dir", data]),
    lambda: train(["--recipe", "smol-llava-easy-vqa", "--output_dir", run, *others]),
    lambda: evaluate(["run", "--adapter", run, *test, "--forgetting_tokens", "0", "--output_dir", run]),
)
for step in steps:
    if code := step():
        sys.exit(code)
print(f"published convolutional network: {PUBLISHED}")
