"""Videos for tests: files that PyAV writes, what templates write for a video, and records about videos."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import av
import numpy as np

from support.vlm_families import VLM_FAMILIES

# What the published templates write for a video.
VIDEO_PARTS = {
    "qwen2_vl": "<|vision_start|><|video_pad|><|vision_end|>",
    "qwen2_5_vl": "<|vision_start|><|video_pad|><|vision_end|>",
    "qwen3_vl": "<|vision_start|><|video_pad|><|vision_end|>",
    "internvl": "<video>\n",
    "llava_onevision": "<video>\n",
    "glm4v": "<|begin_of_video|><|video|><|end_of_video|>",
    "smolvlm": "<video>",
}
if find_spec("num2words") is None:
    del VIDEO_PARTS["smolvlm"]


def video_template(name: str) -> str:
    """Return the template of a family, which writes videos too."""
    template = VLM_FAMILIES[name].template
    written = f"{{% elif part.type == 'video' %}}{VIDEO_PARTS[name]}{{% elif 'text' in part %}}"
    assert "{% elif 'text' in part %}" in template
    with_videos = template.replace("{% elif 'text' in part %}", written)
    return with_videos.replace("{% generation %}", "").replace("{% endgeneration %}", "")


def asked(*parts: Any, answer: str = "A cat.") -> dict[str, Any]:
    """Return a record of messages: the parts of a question (texts, or finished parts), and its answer."""
    content = [part if isinstance(part, dict) else {"type": "text", "text": part} for part in parts]
    return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]}


def write_video(
    path: Path,
    num_frames: int = 30,
    *,
    rate: int = 10,
    size: tuple[int, int] = (64, 48),
    rotation: int = 0,
    faststart: bool = False,
) -> Path:
    """Write a video whose frames all differ; the right half of each is bright. Returns `path`."""
    width, height = size
    codec = "libvpx-vp9" if path.suffix == ".webm" else "mpeg4"
    options = {"movflags": "faststart"} if faststart else {}  # what describes the frames comes before them
    with av.open(path, "w", options=options) as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        if rotation:
            stream.set_display_rotation(rotation)
        for number in range(num_frames):
            picture = np.full((height, width, 3), 200, np.uint8)
            picture[:, : width // 2] = 100 * number // num_frames
            picture[: height // 2, :, 1] = 20 * (number % 5)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return path
