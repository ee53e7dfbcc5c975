"""Questions to vision-language models of other families than LLaVA: answers as transformers' pipeline gives them."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from transformers import pipeline

from milora_data.batches.processor_collator import ProcessorCollator
from milora_data.batches.processor_inputs import sampler
from milora_data.encode.chat_template_mask import parts_of
from milora_data.encode.templates import OWN
from milora_data.pictures.videos import read_video
from milora_data.records.record import Turn
from milora_eval.answers.runner import loglikelihoods
from milora_vl import Policy, apply_milora, save_adapter
from milora_vl.chat.__main__ import main as chat
from milora_vl.chat.session import Chat
from milora_vl.common.errors import UserError
from milora_vl.interop.load_model import load_model
from milora_vl.models.generate import Prompt, generate
from milora_vl.models.losses import summed_loss
from milora_vl.models.prompts import Prompts
from support.problems import raises_code
from support.versions import needs_spans
from support.videos import video_template, write_video
from support.vlm_families import VLM_FAMILIES, model_of, processor_of
from support.vlm_runs import record, write_model

pytestmark = [pytest.mark.filterwarnings("ignore"), needs_spans]
FAST = ("qwen2_5_vl", "gemma3", "mllama")
OTHERS = [name for name in VLM_FAMILIES if name not in (*FAST, "paligemma")]
Captured = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model("qwen2_5_vl", tmp_path_factory.mktemp("qwen"))


def questions(pictures: Path) -> list[Prompt]:
    """Return questions with a picture first, last, in the middle, several in two turns, and none."""
    images = [Image.open(pictures / f"{number}.png") for number in range(4)]
    dialogue = (Turn("user", "<image>\n<image>\nA?"), Turn("assistant", "B"), Turn("user", "<image>\nC?"))
    return [
        Prompt((Turn("user", "<image>\nWhat is it?"),), (images[0],)),
        Prompt((Turn("user", "What is it?\n<image>"),), (images[1],)),
        Prompt((Turn("user", "Is this <image> a longer question than the others?"),), (images[2],)),
        Prompt(dialogue, tuple(images[1:])),
        Prompt((Turn("user", "Hi"),)),
    ]


def of_pipeline(model: Any, processor: Any, prompt: Prompt) -> str:
    ask = pipeline("image-text-to-text", model=model, processor=processor)
    images = iter(prompt.images)
    messages = [
        {
            "role": turn.role,
            "content": [
                {**part, "image": next(images)} if part["type"] == "image" else part for part in parts_of(turn.text)
            ],
        }
        for turn in prompt.turns
    ]
    options = {"max_new_tokens": 5, "return_full_text": False, "generate_kwargs": {"do_sample": False}}
    return str(ask(text=messages, **options)[0]["generated_text"]).strip()


@pytest.mark.parametrize("name", [*FAST, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)])
def test_answers_are_those_of_the_pipeline_at_any_batch_size(name: str, pictures: Path) -> None:
    if name == "smolvlm":
        pytest.importorskip("num2words")
    processor = processor_of(name)
    model = model_of(name, processor)
    prompts = questions(pictures)
    seen: list[int] = []
    together = generate(model, processor, prompts, max_new_tokens=5, on_batch=lambda indices, _: seen.extend(indices))
    assert [reply.text for reply in together] == [of_pipeline(model, processor, prompt) for prompt in prompts]
    assert together == generate(model, processor, prompts, max_new_tokens=5, batch_size=1)
    assert sorted(seen) == list(range(len(prompts)))


def test_a_plain_prompt_is_a_question_with_its_picture(pictures: Path) -> None:
    processor = processor_of("paligemma")
    model = model_of("paligemma", processor)
    image = Image.open(pictures / "0.png").convert("RGB")
    inputs = processor(text="<image>What is it?", images=image, return_tensors="pt")
    inputs.pop("labels")
    ids = model.generate(**inputs, max_new_tokens=5, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    prompt = Prompt((Turn("user", "<image>\nWhat is it?"),), (image,))
    (answer,) = generate(model, processor, [prompt], max_new_tokens=5)
    assert answer.text == processor.tokenizer.decode(ids, skip_special_tokens=True).strip()


def test_a_raw_prompt_is_the_text_alone(pictures: Path) -> None:
    processor = processor_of("qwen2_5_vl")
    model = model_of("qwen2_5_vl", processor)
    image = Image.open(pictures / "0.png").convert("RGB")
    inputs = processor(text="A: <|image_pad|> B:", images=image, return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=5, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    prompt = Prompt((Turn("user", "A: <image> B:"),), (image,), "raw")
    (answer,) = generate(model, processor, [prompt], max_new_tokens=5)
    assert answer.text == processor.tokenizer.decode(ids, skip_special_tokens=True).strip()


def asked(qwen: Path, *words: str | Path) -> int:
    return chat(["--model", str(qwen), "--max_new_tokens", "5", *map(str, words)])


def answer_to(qwen: Path, pictures: Path, *texts: str, images: tuple[int, ...]) -> str:
    model, processor = load_model(qwen)
    turns = [Turn(("user", "assistant")[number % 2], text) for number, text in enumerate(texts)]
    files = tuple(pictures / f"{number}.png" for number in images)
    return generate(model, processor, [Prompt(tuple(turns), files)], max_new_tokens=5)[0].text


@pytest.fixture
def thin(tmp_path: Path) -> Path:
    Image.new("RGB", (3000, 4)).save(tmp_path / "thin.png")  # Qwen's processor takes no ratio above 200
    return tmp_path / "thin.png"


def test_a_picture_that_the_processor_refuses_is_an_error_before_weights_load(
    qwen: Path, pictures: Path, thin: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("milora_vl.chat.session.Chat.load", lambda _: pytest.fail("the weights load"))
    for question in (["What?"], []):
        with raises_code("", where="--image"):
            asked(qwen, "--image", pictures / "0.png", "--image", thin, *question)


def test_a_mark_in_an_answer_is_a_text() -> None:
    assert Chat.answer_turn("Write <image> there.").text == "Write [image] there."


def test_marks_in_a_question_are_places_of_its_pictures(
    qwen: Path, pictures: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = ["--image", pictures / "0.png", "--image", pictures / "1.png"]
    asked(qwen, *shown, "Is <image> like <image>?")
    assert capsys.readouterr().out == answer_to(qwen, pictures, "Is <image> like <image>?", images=(0, 1)) + "\n"
    asked(qwen, *shown, "Like <image>?")
    expected = answer_to(qwen, pictures, "<image>\nLike <image>?", images=(0, 1))
    assert capsys.readouterr().out == expected + "\n"
    typed = ["A?", "Like <image>?", f"/add {pictures / '1.png'}", "Like <image>?", "/quit"]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(typed)))
    asked(qwen, "--image", pictures / "0.png")
    first = answer_to(qwen, pictures, "<image>\nA?", images=(0,))
    second = answer_to(qwen, pictures, "<image>\nA?", first, "Like <image>?", images=(0, 1))
    out, err = capsys.readouterr()
    assert out == f"{first}\n{second}\n"
    assert "question 'Like <image>?': 2 <image> in the conversation, but 1 picture shown" in err


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    for number in range(4):
        Image.effect_noise((40, 24), 90).convert("RGB").save(folder / f"{number}.png")
    return folder


def test_chat_shows_the_frames_of_a_folder_as_a_video(
    qwen: Path, clip: Path, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = load_model(qwen)
    written = "{% elif part.type == 'video' %}<|vision_start|><|video_pad|><|vision_end|>{% elif 'text' in part %}"
    processor.chat_template = processor.chat_template.replace("{% elif 'text' in part %}", written)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    frames = [Image.open(file).convert("RGB") for file in sorted(clip.iterdir())]
    text = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "What?"}]}],
        tokenize=False, add_generation_prompt=True,
    )  # fmt: skip
    inputs = processor(
        text=[text], videos=[frames], do_sample_frames=False, return_tensors="pt",
        video_metadata=[{"total_num_frames": 4, "fps": 2.0, "frames_indices": [0, 1, 2, 3]}],
    )  # fmt: skip
    ids = model.generate(**inputs, max_new_tokens=5, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    expected = processor.tokenizer.decode(ids, skip_special_tokens=True).strip()
    assert asked(tmp_path, "--video", clip, "--fps", 2, "What?") == 0
    assert capsys.readouterr().out == expected + "\n"
    picture = clip / "0.png"
    typed = ["What?", "/reset", "What?", f"/image {picture}", "What?", f"/video {clip}", "What?", "/quit"]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(typed)))
    assert asked(tmp_path, "--video", clip, "--fps", 2) == 0
    of_picture = generate(model, processor, [Prompt((Turn("user", "<image>\nWhat?"),), (picture,))], max_new_tokens=5)
    assert capsys.readouterr().out == f"{expected}\n{expected}\n{of_picture[0].text}\n{expected}\n"


def test_chat_shows_a_video_file(qwen: Path, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    film, other = write_video(tmp_path / "film.mp4"), write_video(tmp_path / "other.mp4", 50)
    model, processor = load_model(qwen)
    processor.chat_template = video_template("qwen2_5_vl")
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    prompts = [
        Prompt(
            (Turn("user", "<video>\nWhat?"),),
            videos=(read_video(file, sampler(processor.video_processor, num_frames=4)),),
        )
        for file in (film, other)
    ]
    expected = [generate(model, processor, [prompt], max_new_tokens=5)[0].text for prompt in prompts]
    words = ("--video", film, "--num_frames", 4)
    assert asked(tmp_path / "model", *words, "What?") == 0
    assert capsys.readouterr().out == expected[0] + "\n"
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(["What?", f"/video {other}", "What?", "/quit"])))
    assert asked(tmp_path / "model", *words) == 0
    assert capsys.readouterr().out == f"{expected[0]}\n{expected[1]}\n"
    film.write_bytes(b"\0")
    with raises_code("video-unreadable", where=f"--video: {film}"):
        asked(tmp_path / "model", *words, "What?")


def test_another_template_is_refused(qwen: Path) -> None:
    with pytest.raises(UserError) as error:
        asked(qwen, "--template", "vicuna_v1", "What?")
    assert "vicuna_v1" in str(error.value)


def test_a_chat_has_the_limits_of_the_training(qwen: Path, pictures: Path, tmp_path: Path, capsys: Captured) -> None:
    model, processor = load_model(qwen)
    save_adapter(
        apply_milora(model, Policy.parse("[{modules: language, method: milora, protect: 0, rank: 2}]")), tmp_path
    )
    (tmp_path / "recipe.yaml").write_text("{template: chat_template, data: {max_pixels: 256}}")
    processor.image_processor.size = type(processor.image_processor.size)(shortest_edge=256, longest_edge=256)
    prompt = Prompt((Turn("user", "<image>\nWhat?"),), (pictures / "1.png",))
    expected = generate(load_model(qwen)[0], processor, [prompt], max_new_tokens=5)[0].text
    asked(qwen, "--adapter", tmp_path, "--image", pictures / "1.png", "What?")
    assert capsys.readouterr().out == expected + "\n"


@pytest.mark.parametrize("name", ["qwen2_5_vl", "paligemma"])
def test_the_likelihood_of_an_answer_is_the_models_own_loss(name: str, pictures: Path) -> None:
    processor = processor_of(name)
    model = model_of(name, processor)
    values = [record([("human", "<image>\nWhat is it?"), ("gpt", "A cat.")], ["0.png"])]
    batch = ProcessorCollator(processor, image_folder=pictures)(values)
    summed, count = summed_loss(model, batch, chunked=False)
    end = int(batch["labels"][0][batch["labels"][0] != -100][-1])
    answer = "A cat." + (processor.tokenizer.decode(end) if name == "qwen2_5_vl" else "")  # else the processor adds it
    prompt = Prompt((Turn("user", "<image>\nWhat is it?"),), (pictures / "0.png",))
    ((likelihood, leads), (empty, _)) = loglikelihoods(
        model, processor, [(prompt, answer), (prompt, "")], Prompts(OWN, "pad")
    )
    assert likelihood == pytest.approx(-float(summed), rel=1e-5)
    assert (count, leads, empty) == (7, False, 0.0)
