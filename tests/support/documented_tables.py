"""How the commands of README and docs run in a test: replacements for large models and long trainings, exceptions."""

from __future__ import annotations

# Regular expression -> what replaces the text that it matches, from top to bottom. First what the docs leave open.
LEFT_OPEN: tuple[tuple[str, str], ...] = (
    (r"FOLDER --to FORM .*", "runs/a --to adapter --output_dir O --base tiny --dtype bfloat16 --with_base"),
    (r"(train) \.\.\. (--forgetting_every) 50", r"\1 --model tiny --data_path train.json --image_folder images \2 1"),
    (r"(--adapter served) \.\.\.", r"\1 --suite emoji --output_dir out"),
    (r"(--data_path captions\.json) \.\.\.", r"\1 --image_folder images --output_dir runs/stage1"),
    (r"(runs/stage1 --data_path train\.json) \.\.\.", r"\1 --image_folder images --output_dir runs/stage2"),
    (r"(--version v1 --data_path train\.json --image_folder images) \.\.\.", r"\1 --output_dir runs/llava"),
    (r"(replace .*train\.py) \.\.\.", r"\1 4 replaced"),
    (
        r"(llava/train/train_mem\.py .*)\.\.\.",
        r"\1--model_name_or_path vicuna --version v1 --data_path train.json --image_folder images "
        "--vision_tower clip --mm_projector_type mlp2x_gelu --image_aspect_ratio pad --bf16 False --max_steps 1 "
        "--report_to none --use_cpu True --save_strategy no --lora_r 4 --output_dir runs/llava-lora",
    ),
    (r"milora demo(?: --quick)?$", "milora demo --recipe tiny-demo.yaml --quick"),
    (r"milora_vl\.train --method$", "milora_vl.train --model tiny --rank 4 --method lora --dry-run"),
    (r"milora train --dry-run", "milora train --model tiny --rank 4 --dry-run"),
    (r"O/recipes/CELL\.yaml", "tiny-test --data_path train.json --image_folder images"),
    (r"report RUN", "report runs/a"),
)
# Then what is too large for a test. Commands that only plan or list (PLANS) run unchanged.
PLANS = ("--dry-run", "--list-", "--print-recipe")
SUBSTITUTIONS: tuple[tuple[str, str], ...] = (
    # Models, the parts that they are made of, and a data set of the hub.
    (r"llava-1\.5-(7|13)b|liuhaotian/llava-v1\.5-7b(?= )|smol-llava(?=[ ,]|$)", "tiny"),
    (r"llama-2-7b|llama-3-8b|qwen2\.5-7b", "tiny-text"),
    (r"--model smollm2", "--model instruct"),
    (r"Qwen/Qwen2\.5-VL-3B-Instruct|qwen2\.5-vl-3b", "qwen-vl"),
    (r"lmsys/vicuna-7b-v1\.5", "language"),
    (r"openai/clip-vit-large-patch14-336", "tower"),
    (r"timm/vit_small_patch16_224 --language FOLDER", "timm/test_vit --vision_weights random --language language"),
    (r"--base BASE --initial pissa_init", "--base tiny --initial pissa_init --output_dir of-initial"),
    (r"hub:HuggingFaceH4/ultrafeedback_binarized:train_sft", "ultrafeedback.parquet"),
    # Recipes: their models.
    (r"(\btrain --recipe paper-visual .*)", r"\1 --model language --vision_tower tower"),
    (r"(\btrain --recipe paper-(?!visual)(?!.*--model).*)", r"\1 --model tiny-text"),
    (r"(\btrain --recipe (?:smol-llava-demo|smol-llava-easy-vqa|mine\.yaml) .*)", r"\1 --model tiny"),
    (r"(sweep --recipe) smol-llava-demo", r"\1 tiny-demo.yaml"),
    # Sizes.
    (r"(\btrain .*)(--rank|--lora_r) (?:32|128)", r"\1\2 4"),
    (r"(\btrain (?!.*(?:--rank |--lora_r |--tune_)).* .*)", r"\1 --rank 4"),
    (r"(\btrain .*--model qwen-vl .*)--rank 4", r"\1--rank 2"),  # so few inputs are left outside the protected ones
    (r"(\btrain (?!.*--max_steps ).* .*)", r"\1 --max_steps 2"),
    (r"(\btrain --recipe paper-visual .*)", r"\1 --dataloader_num_workers 0"),
    (r"(\btrain --recipe paper-commonsense .*)", r"\1 --fp16 False"),
    (r"emoji --output_dir data/emoji", "emoji --output_dir data/emoji-made --per_type 2"),
    (r"--hold_out 100", "--hold_out 2"),
    (r"(milora_vl\.chat .*)", r"\1 --max_new_tokens 4"),
    (r"(forgetting --.*?)(?: --num_tokens 300000)?$", r"\1 --num_tokens 64"),
    (r"(forgetting --(?!.*--on).*)", r"\1 --limit 2"),
    (r"(milora_eval run .*)", r"\1 --forgetting_tokens 64"),
    (r"(milora_eval run .*--limit) 1000", r"\1 8"),
    (r"(--methods milora,lora --lrs) 3e-4,1e-3,3e-3 --seeds 3", r"\1 1e-3 --seeds 1"),
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
    r"swift sft ": "ms-swift needs a separate environment",
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
    "docs/continue.md": ("runs/a",),
    "docs/evaluation.md": ("runs/a", "runs/demo"),
    "docs/exporting.md": ("runs/a", "vicuna-clip", "llava-v1.5-7b-lora", "pissa_init"),
    "docs/forgetting.md": ("runs/demo", "runs/full"),
    "docs/reproduce.md": ("checkpoints/llava-v1.5-7b-lora",),
    "docs/run-folder.md": ("runs/a",),
    "docs/serving.md": ("runs/a",),
    "docs/training.md": ("runs/a",),
}
# Pages whose trainings are alternatives with one output folder: it is removed before each of them.
ALTERNATIVES = ("docs/scaling.md",)

DEMO = "model: tiny\ndata: {path: train.json, image_folder: images, eval_path: val.json}\n"
RULES = (
    "policy: [{modules: language, method: milora, protect: 0, rank: 4, learning_rate: 1.0e-3}]\n"
    "train: {max_steps: 100}\n"
)
# Page and first line of a block -> name of the file it shows, text to put before it, and a command that reads the file.
FILES: dict[tuple[str, str], tuple[str, str, str]] = {
    ("docs/data-format.md", "["): ("cats.json", "", "python -m milora_data check cats.json --image_folder ."),
    ("docs/data-format.md", "seed: 0"): ("mixture.yaml", "", "python -m milora_data check mixture.yaml"),
    ("docs/evaluation.md", '[{"image": "a.png", "question": "How many?", "answer": "3", "metric": "relaxed"}]'): (
        "rows.json",
        "",
        "python -m milora_eval run --model tiny --benchmarks rows.json --output_dir of-rows",
    ),
    ("docs/evaluation.md", "eval: {suites: [emoji], data: data/emoji, suite_every: 50, suite_limit: 64}"): (
        "scored.yaml",
        DEMO + RULES,
        "python -m milora_vl.train --recipe scored.yaml --dry-run",
    ),
    ("docs/recipes.md", "model: llava-1.5-7b"): (
        "recipe.yaml",
        "",
        "python -m milora_vl.train --recipe recipe.yaml --dry-run",
    ),
    ("docs/protection.md", "policy:"): (
        "inputs.yaml",
        DEMO,
        "python -m milora_vl.train --recipe inputs.yaml --dry-run",
    ),
    ("docs/protection.md", "calibration: {samples: 48, text: [notes.txt]}"): (
        "calibrated.yaml",
        DEMO + RULES.replace("learning_rate", "protect: 0.95, learning_rate"),
        "python -m milora_vl.train --recipe calibrated.yaml --dry-run",
    ),
    ("docs/sweeps.md", "sweep:"): (
        "sweep.yaml",
        DEMO + RULES,
        "python -m milora_vl.sweep --recipe sweep.yaml --methods milora,lora-strong --lrs 1e-3 --plan",
    ),
}
# Page and first line of a change in Python -> the script before it, and replacements in it.
CHANGES: dict[tuple[str, str], tuple[str, tuple[tuple[str, str], ...]]] = {
    ("docs/integrations.md", '+ rules = "[{modules: language'): (
        "import torch\n"
        "from milora_vl import apply_milora, calibration_texts, load_model\n"
        "from transformers import Trainer, TrainingArguments\n"
        "model, _ = load_model('tiny-text')\n"
        "arguments = TrainingArguments('trained', max_steps=1, report_to='none')\n"
        "rows = [{'input_ids': [1, 2, 3], 'labels': [1, 2, 3]}] * 8\n"
        "batches = [{name: torch.tensor([ids]) for name, ids in rows[0].items()}]\n",
        (
            ("rank: 64", "rank: 4"),
            ("model=model, ...)", "model=model, args=arguments, train_dataset=rows)"),
            ("resume_from_checkpoint=...", "resume_from_checkpoint=None"),
        ),
    ),
}
# Page and language of blocks that no test runs -> why.
NO_CODE: dict[tuple[str, str], str] = {
    ("docs/scaling.md", ""): "needs two machines",
    ("docs/quickstart.md", ""): "what the demo prints",
    ("docs/install.md", "bibtex"): "a citation",
    ("docs/upstream.md", ""): "a proposal for another library",
    ("docs/data-format.md", "text"): "records with shortened parts; tests/data reads records of each form",
    ("docs/integrations.md", "py"): "LLaMA-Factory and ms-swift need separate environments",
}
