"""Fuzz the reader of LLaVA JSON and `messages` with atheris, which changes inputs towards code not reached yet.

pip install atheris
python benchmarks/fuzz_coverage.py -max_total_time=60 -rss_limit_mb=1024 -timeout=10

Any exception but `UserError`, more than 10 s or more than 1 GiB ends it with a report (the flags are libFuzzer's).
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["milora_data"]):
    from milora_data.stream.sources import load_records
    from milora_vl.base.errors import UserError

SEEDS = (
    b'[{"id": "a", "image": "a.png", "conversations": [{"from": "human", "value": "<image>\\nHi"}, '
    b'{"from": "gpt", "value": "Ho"}]}]',
    b'{"messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Hi"}]}, '
    b'{"role": "assistant", "content": "Ho"}], "images": ["a.png"]}\n{"prompt": "a", "completion": "b"}\n',
)


def main() -> None:
    """Run libFuzzer with the flags of the command line."""
    with tempfile.TemporaryDirectory() as folder:
        file, corpus = Path(folder) / "data.json", Path(folder) / "corpus"
        corpus.mkdir()
        for number, seed in enumerate(SEEDS):
            (corpus / str(number)).write_bytes(seed)

        def read(content: bytes) -> None:
            file.write_bytes(content)
            try:
                for _ in load_records(file):
                    pass
            except UserError:
                return

        atheris.Setup([*sys.argv, str(corpus)], read)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
