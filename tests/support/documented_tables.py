"""How the commands of README and docs run in a test: replacements for large models and long trainings, exceptions."""

from __future__ import annotations

# Regular expression -> what replaces the text that it matches, from top to bottom. First what the docs leave open.
LEFT_OPEN: tuple[tuple[str, str], ...] = (
    (r"(replace .*train\.py) --its_flags", r"\1 4 replaced"),
    (r"(interop\.llava llava/train/train_mem\.py)$", r"\1 --lora_enable True --lora_r 128 --lora_alpha 128 ..."),
    (
        r"(llava/train/train_mem\.py .*)\.\.\.",
        r"\1--model_name_or_path vicuna --version v1 --data_path train.json --image_folder images "
        "--vision_tower clip --mm_projector_type mlp2x_gelu --image_aspect_ratio pad --bf16 False --max_steps 1 "
        "--report_to none --use_cpu True --save_strategy no --lora_r 4 --output_dir runs/llava-lora",
    ),
    (r"milora demo(?: --quick)?$", "milora demo --recipe tiny-demo.yaml --quick"),
)
# Then what is too large for a test. Commands that only plan or list (PLANS) run unchanged.
PLANS = ("--dry-run", "--list-", "--print-recipe")
SUBSTITUTIONS: tuple[tuple[str, str], ...] = (
    # Models, the parts that they are made of, and a data set of the hub.
    (r"(?<![-\w])llava-1\.5-(7|13)b|smol-llava(?=[ ,]|$)", "tiny"),
    (r"llama-2-7b|llama-3-8b|qwen2\.5-7b", "tiny-text"),
    (r"--model smollm2", "--model instruct"),
    (r"qwen2\.5-vl-3b", "qwen-vl"),
    (r"lmsys/vicuna-7b-v1\.5", "language"),
    (r"openai/clip-vit-large-patch14-336", "tower"),
    (r"timm/vit_small_patch16_224 --language FOLDER", "timm/test_vit --vision_weights random --language language"),
    (r"--base BASE --initial pissa_init", "--base tiny --initial pissa_init --output_dir of-initial"),
    (r"hub:HuggingFaceH4/ultrafeedback_binarized:train_sft", "ultrafeedback.parquet"),
    # Recipes: their models.
    (r"(\btrain --recipe milora-paper-\S+ .*)", r"\1 --model language --vision_tower tower"),
    (r"(\btrain --recipe paper-(?!.*--model).*)", r"\1 --model tiny-text"),
    (r"(\btrain --recipe (?:smol-llava-demo|smol-llava-easy-vqa|mine\.yaml) .*)", r"\1 --model tiny"),
    (r"(sweep --recipe) smol-llava-demo", r"\1 tiny-demo.yaml"),
    # Sizes.
    (r"(\btrain .*)(--rank|--lora_r) (?:32|128)", r"\1\2 4"),
    (r"(\btrain (?!.*(?:--rank |--lora_r |--tune_)).* .*)", r"\1 --rank 4"),
    (r"(\btrain .*--model qwen-vl .*)--rank 4", r"\1--rank 2"),  # so few inputs are left outside the protected ones
    (r"(\btrain (?!.*--max_steps ).* .*)", r"\1 --max_steps 2"),
    (r"(\btrain --recipe milora-paper-\S+ .*)", r"\1 --dataloader_num_workers 0"),
    (r"(\btrain --recipe paper-commonsense .*)", r"\1 --fp16 False"),
    (r"emoji --output_dir data/emoji", "emoji --output_dir data/emoji-made --per_type 2"),
    (r"--hold_out 100", "--hold_out 2"),
    (r"(milora_vl\.chat .*)", r"\1 --max_new_tokens 4"),
    (r"(forgetting --.*?)(?: --num_tokens 300000)?$", r"\1 --num_tokens 64"),
    (r"(forgetting --(?!.*--on).*)", r"\1 --limit 2"),
    (r"(milora_eval run .*)", r"\1 --forgetting_tokens 64"),
    (r"(milora_eval run .*--limit) 1000", r"\1 8"),
    (r"(--methods milora,lora,milora-paper --lrs) 3e-4,1e-3,3e-3 --seeds 3", r"\1 1e-3 --seeds 1"),
    (r"(studies [\w.-]+) --docs", r"\1 --plan --docs"),
    # An output folder that the page's other way to the same result has filled.
    (r"--output_dir vicuna-clip", "--output_dir composed"),
    (r"^make ", "make -n "),
)

# Regular expression -> why no test runs the commands that match. Flags of our own programs, extras named to pip and
# files are checked all the same.
EXCEPTIONS: dict[str, str] = {
    r"(python3? -m |uv )?pip (install|uninstall|download)|python3 -m venv": "changes an environment",
    r"git clone ": "needs the network; stand-ins are made by tests/support/documented_files.py",
    r"source ": "means the reader's own shell",
    r"hf download ": "needs the model hub; its files are made by tests/support/documented_files.py",
    r"vllm serve |python -m (sglang|vllm)": "need a separate environment, where tests/export/test_vllm.py starts vLLM",
    r"transformers serve |curl ": "the server runs until it is stopped; tests/export/test_serving.py starts it",
    r"llama-server |ollama ": "not from the package index",
    r"python examples/\w+_trl\.py ": "trl is optional; tests/interop/test_trl.py runs these with tiny models",
    r"swift sft |.*train\.py train\.yaml": "ms-swift and LLaMA-Factory need separate environments",
    r"python -m lmms_eval ": "lmms-eval needs a separate environment",
    r"python -m milora_eval\.lm_eval ": "lm-evaluation-harness is not installed, and reads its tasks from the hub",
    r"python -m milora_eval run --server ": "needs a server; tests/eval/test_eval_server.py starts one",
    r"python -m studies\.peft_metamath ": "needs a GPU and the hub; tests/studies/test_peft_metamath.py has a stand-in",
    r"python (benchmarks|tests/support)/": "minutes to an hour each",
    r"(\S+/python -m )?pytest ": "would run tests inside a test",
    r"pre-commit ": "installs a hook into the reader's checkout",
}
# Regular expression -> why only `-m slow` runs the commands that match. That run also starts launched commands by their
# own launcher, with two processes; the fast one runs them in one process.
SLOW: dict[str, str] = {
    r"python -m milora_vl\.sweep (?!.*--plan)": "each cell is two programs",
    r"(python -m|deepspeed .*--module) milora_vl\.interop\.llava ": "LLaVA's own training",
    r"milora demo": "four programs, one after another",
    r"torchrun .* --fsdp": "FSDP2 needs several processes",
    r"python -m milora_data emoji ": "draws the whole set, as tests/data/test_emoji.py does",
}
# Page -> what its reader already has: names in PRESUMED of tests/support/documented_files.py.
PAGES_PRESUME: dict[str, tuple[str, ...]] = {
    "docs/choose.md": ("runs/mine",),
    "docs/compare.md": ("runs/demo", "runs/full"),
    "docs/evaluate.md": ("runs/a", "runs/demo"),
    "docs/export.md": ("runs/a", "vicuna-clip", "llava-v1.5-7b-lora", "pissa_init"),
    "docs/next-task.md": ("runs/a",),
    "docs/train.md": ("runs/a",),
}

DEMO = "model: tiny\ndata: {path: train.json, image_folder: images, eval_path: val.json}\n"
RULES = (
    "policy: [{modules: language, method: milora, protect: 0, rank: 4, learning_rate: 1.0e-3}]\n"
    "train: {max_steps: 100}\n"
)
# Page and first line of a block -> name of the file it shows, text to put before it, and a command that reads the file.
FILES: dict[tuple[str, str], tuple[str, str, str]] = {
    ("docs/data.md", "["): ("cats.json", "", "python -m milora_data check cats.json --image_folder ."),
    ("docs/data.md", "seed: 0"): ("mixture.yaml", "", "python -m milora_data check mixture.yaml"),
    (
        "docs/evaluate.md",
        '[{"image": "a.png", "question": "How many?", "answer": "3", "metric": "relaxed", "type": "count"}]',
    ): ("rows.json", "", "python -m milora_eval run --model tiny --benchmarks rows.json --output_dir of-rows"),
    ("docs/evaluate.md", "eval: {suites: [emoji], data: data/emoji, suite_every: 50, suite_limit: 64}"): (
        "scored.yaml",
        DEMO + RULES,
        "python -m milora_vl.train --recipe scored.yaml --dry-run",
    ),
    ("docs/train.md", "model: llava-1.5-7b"): (
        "recipe.yaml",
        "",
        "python -m milora_vl.train --recipe recipe.yaml --dry-run",
    ),
    ("docs/compare.md", "sweep:"): (
        "sweep.yaml",
        DEMO + RULES,
        "python -m milora_vl.sweep --recipe sweep.yaml --methods milora,lora-strong --lrs 1e-3 --plan",
    ),
}
# Page and language of blocks that no test runs -> why.
NO_CODE: dict[tuple[str, str], str] = {
    ("docs/quickstart.md", ""): "what the demo prints",
    ("docs/contributing/upstream.md", ""): "a proposal for another library",
    ("docs/data.md", "text"): "records with shortened parts; tests/data reads records of each form",
    ("docs/trainers.md", "py"): "LLaMA-Factory and ms-swift need separate environments",
}
