"""A folder in place of llama.cpp's repository: scripts that note their arguments and write an empty file."""

from __future__ import annotations

import json
from pathlib import Path

from milora_vl.export.gguf import LORA_SCRIPT, MODEL_SCRIPT

SCRIPT = """import json, sys
from pathlib import Path

here, arguments = Path(__file__).parent, sys.argv[1:]
inputs = [path for path in map(Path, arguments) if path.is_dir()]
seen = {"script": Path(__file__).name, "arguments": arguments}
seen["configs"] = [json.loads(file.read_text()) for path in inputs for file in sorted(path.glob("*config.json"))]
seen["files"] = [sorted(file.name for file in path.iterdir()) for path in inputs]
with (here / "calls.jsonl").open("a") as log:
    log.write(json.dumps(seen) + "\\n")
says = here / ("says-mmproj" if "--mmproj" in arguments else "says")
if says.is_file():
    sys.stderr.write(says.read_text())
    sys.exit(1)
Path(arguments[arguments.index("--outfile") + 1]).write_bytes(b"GGUF")
"""


def write_stand_in(folder: Path) -> Path:
    """Write both scripts. What a file `says` or `says-mmproj` next to them holds is their last words: they fail."""
    folder.mkdir(parents=True)
    for name in (MODEL_SCRIPT, LORA_SCRIPT):
        (folder / name).write_text(SCRIPT, encoding="utf-8")
    return folder


def calls(folder: Path) -> list[dict[str, list[str]]]:
    """Return the script, arguments, and the files and configs in the input folders of each call."""
    return [json.loads(line) for line in (folder / "calls.jsonl").read_text(encoding="utf-8").splitlines()]
