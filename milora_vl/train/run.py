"""One training run, step by step; `milora_vl.train` tells them in order."""

from __future__ import annotations

import gc
import signal
import time
from datetime import datetime
from pathlib import Path
from typing import Any

from milora_data.errors import UserError
from milora_vl import checkpoints
from milora_vl.checkpoints import step_of
from milora_vl.plan import evaluation, requirements, run_data, run_folder, training_args
from milora_vl.plan.batching import Batching
from milora_vl.plan.launch import calls_on_sigterm
from milora_vl.plan.screen import Screen, policy_rows, trainable_line
from milora_vl.plan.training_args import trained_dtype
from milora_vl.recipe import base_model, on_model, settings
from milora_vl.recipe.arguments import Request
from milora_vl.train import failures, features, model, resuming, run_files, streaming
from milora_vl.train.finalize import close, write_pages
from milora_vl.train.forgetting import ForgettingCallback, Probe
from milora_vl.train.spectrum import layer_spectra
from milora_vl.train.trainer import MiloraTrainer

# What the collator counts, in words.
WHAT_HAPPENED = {
    "skipped": "a record was left out because a picture of it is missing or broken",
    "replaced": "a missing or broken picture was replaced by a plain one",
    "unlearnable": "a record was left out because nothing of its answers is left within --max_length",
    "cut": "a record was cut to --max_length",
    "broken": "a broken record was left out (python -m milora_data check)",
}


class Run:
    """State of one run. Everything that can be wrong is found before the model loads."""

    def __init__(self, request: Request) -> None:
        self.start = time.monotonic()
        self.screen = Screen()
        self.request = request
        self.trainer: Any = None
        self.failed: list[str] = []  # evaluations that did not come to their end
        self.settings = settings.resolve(request)
        self.recipe = self.settings.recipe
        path = Path(request.output_dir) if request.output_dir else run_folder.default_path(self.recipe, datetime.now())
        self.folder = run_folder.choose(path, request.resume)
        requirements.check(self.recipe.train, self.recipe.quantization, self.recipe.attn_implementation)
        for note in self.settings.notes:
            self.screen.say(note)
        for warning in self.settings.warnings:
            self.screen.warn(warning)

    def is_done(self) -> bool:
        """Whether `--resume_from_checkpoint auto` finds a finished run: a requeued job has nothing left to do."""
        if (self.request.resume or "").lower() != "auto" or not run_folder.is_finished(self.folder.path):
            return False
        self.screen.say(f"{self.folder.path} is finished; nothing to resume")
        return True

    def check_policy(self) -> None:
        """Find out by the model's config, before anything is read, what the rules say wrongly of it."""
        settings.require_fit(self.request, self.recipe)

    def read_data(self) -> None:
        """Read and check the records, and settle HF's arguments and the number of steps."""
        with self.screen.step(f"reading {run_data.describe(self.recipe.data)}"):
            self.data = run_data.read(self.recipe.data)
        if self.data.skipped:
            self.screen.warn(f"{self.data.skipped:,} records with missing pictures are left out (--bad_images skip)")
        for finding in self.data.broken[:5]:
            self.screen.warn(f"{finding.where}: {finding.sentence}")
        if self.data.broken:
            self.screen.warn(f"{len(self.data.broken):,} broken records are left out (python -m milora_data check)")
        if self.data.unlearnable:
            self.screen.warn(f"{self.data.unlearnable:,} records without an answer are left out")

        self.args, warnings = training_args.make(self.recipe, self.folder.path)
        self._count_steps(None if self.recipe.data.streaming else len(self.data.train))
        if self.folder.checkpoint is not None:
            stage = training_args.zero_stage(self.args)
            warnings += resuming.check(self.folder.checkpoint, processes=self.args.world_size, stage=stage)
        for warning in [*warnings, *self._warnings()]:
            self.screen.warn(warning)

    def _count_steps(self, num_items: int | None) -> None:
        self.batching = Batching(
            num_records=num_items,
            per_device=self.args.per_device_train_batch_size,
            accumulation=self.args.gradient_accumulation_steps,
            num_devices=self.args.world_size,
            epochs=self.args.num_train_epochs,
            max_steps=self.args.max_steps,
            drop_last=self.args.dataloader_drop_last,
        )
        if self.folder.checkpoint is not None and step_of(self.folder.checkpoint) > self.batching.steps:
            raise UserError(
                f"{self.folder.checkpoint} is beyond the end of this run, step {self.batching.steps:,}\n"
                "raise --max_steps or --num_train_epochs to train on from it"
            )

    def check_evaluation(self) -> None:
        """Find out now what loading the model, or the evaluation after the training, would stumble over."""

        evaluation.check(self.recipe.eval)
        base_model.check(self.recipe)

    def load_model(self) -> None:
        """Load the base model and its processor."""

        with self.args.main_process_first(desc="composing the base"):
            self.recipe, line = base_model.settled(self.recipe)
        self.dtype = training_args.base_dtype(self.recipe, self.recipe.train)
        if line:
            self.screen.say(line)
        with self.screen.step(f"loading {self.recipe.model}"):
            self.base, self.processor = model.load_base(self.recipe, self.dtype, training_args.load_device(self.args))
        self.recipe = on_model.rules_for(self.recipe, self.base, implicit=self.settings.implicit_policy)
        for warning in on_model.model_warnings(self.recipe, self.base, self.processor):
            self.screen.warn(warning)
        self.probe = None
        if self.recipe.eval.forgetting_every:
            with self.screen.step("keeping the base's predictions, for forgetting"):
                self.probe = Probe(self.base, self.processor)

    def arrange_data(self) -> None:
        """Count tokens where the recipe groups records by length, and pack them where it asks for that."""

        self.items: Any = self.data.train
        self.lengths = run_files.lengths(self.recipe, self.base, self.processor, self.data.train)
        if self.recipe.data.packing:
            assert self.lengths is not None
            self.items, line = run_files.packed(self.recipe, self.data.train, self.lengths)
            self.lengths = None
            self.screen.say(line)
            self._count_steps(len(self.items))
        if self.recipe.data.streaming:
            self.items = streaming.stream_of(self.recipe, self.args)
            self.args.ignore_data_skip = True  # a resumed stream is where it was

    def apply_policy(self) -> None:
        """Make the adapters, or put a checkpoint's back; nothing of the base changes in the anchored form."""
        from transformers import set_seed

        targets = on_model.targets_of(self.recipe, self.base)
        if self.describes_start():
            with self.screen.step("measuring the spectrum of one layer per tower"):
                self.spectra = layer_spectra(self.base, targets)
        set_seed(self.args.seed)  # LoRA starts from random numbers, here as in HF's example scripts
        checkpoint = self.folder.checkpoint
        with self.screen.step("applying the policy" if checkpoint is None else f"restoring {checkpoint}"):
            self.built = model.build(self.recipe, self.base, targets, checkpoint, trained_dtype(self.args))
        if self.args.gradient_checkpointing:
            self.built.model.enable_input_require_grads()  # frozen embeddings would cut the graph

    def open_folder(self) -> None:
        """Show the header and the policy, and write what is known before the first step."""

        self.screen.header(self.header())
        self.screen.policy(policy_rows(self.built.targets, self.built.sizes, self.built.report), self.built.frozen)
        self.screen.say(trainable_line(self.built.model))
        run_files.set_chat_template(self.processor, self.recipe.template)
        if not self.args.should_save:
            return
        self.folder.path.mkdir(parents=True, exist_ok=True)
        for folder, reason in self.folder.incomplete:
            self.screen.warn(f"{folder.name} {reason}; it is kept as {checkpoints.set_aside(folder).name}")
        if self.folder.checkpoint is not None:
            for change in run_files.changes(self.folder.path, self.recipe):
                self.screen.warn(f"the recipe differs from the run's so far: {change}")
        self.environment = run_folder.describe_environment(
            self.recipe,
            ["python", "-m", "milora_vl.train", *self.request.words],
            base=run_files.base_name(self.base) or self.recipe.model,
            device=run_files.device_name(self.args.device),
            data=self.data.counts(),
        )
        if self.folder.checkpoint is not None:
            before = run_folder.read_environment(self.folder.path)
            self.environment = run_folder.continued(before, self.environment, self.folder.checkpoint)
        self.folder.write_text("recipe.yaml", self.recipe.to_yaml())
        self.folder.write_json("environment.json", self.environment)
        if self.describes_start():
            self.folder.write_json("policy.json", run_files.policy_json(self.built))
            self.folder.write_json("spectrum.json", self.spectra)

    def train(self) -> None:
        """Train with HF's Trainer; a keyboard interrupt says how to go on."""
        from peft.helpers import disable_input_dtype_casting
        from transformers import TrainerState

        self.collator = run_files.collator(self.recipe, self.base, self.processor, self.data.train[:100])
        self._use_feature_cache()
        self.trainer = MiloraTrainer(
            self.built.model,
            self.args,
            targets=self.built.targets,
            saves=self.built.saves,
            data_collator=self.collator,
            train_dataset=self.items,
            eval_dataset=self.data.evaluation,
            processing_class=self.processor,
            lengths=self.lengths,
            kinds=None if self.lengths is None else [bool(record.images) for record in self.data.train],
            stream_from=self.folder.checkpoint,
        )
        if self.probe is not None and self.recipe.eval.forgetting_every:
            self.trainer.add_callback(ForgettingCallback(self.probe, self.recipe.eval.forgetting_every, self.trainer))
        checkpoint = self.folder.checkpoint
        if checkpoint is not None and self.has_all_steps():
            self.trainer.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
            return
        try:
            # Autocast casts what it multiplies; PEFT would first widen every input to the adapter's float32.
            with (
                failures.explained(self.args),
                calls_on_sigterm(self.trainer.stop_on_signal.hear),
                disable_input_dtype_casting(self.trainer.trained(), active=self.trainer.accelerator.native_amp),
            ):
                self.trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        except KeyboardInterrupt:
            self.screen.say(f"\nstopped at step {self.trainer.state.global_step}")
            self.screen.say(checkpoints.where_to_go_on(self.folder.path))
            raise
        if self.trainer.stop_on_signal.stopped and self.trainer.state.global_step < self.batching.steps:
            raise UserError(
                f"stopped by SIGTERM at step {self.trainer.state.global_step}, which is saved\n"
                "to go on, repeat the command with  --resume_from_checkpoint auto",
                exit_code=128 + signal.SIGTERM,
            )
        for what, count in self.collator.counts().items():
            if count:
                self.screen.warn(f"{count:,} times while training: {WHAT_HAPPENED[what]}")

    def _use_feature_cache(self) -> None:
        """Let batches hold what the frozen tower makes of the pictures, where the recipe names a folder for it."""
        if self.recipe.data.feature_cache:
            features.check(self.base, self.built.targets)
            records = [*self.data.train, *(self.data.evaluation or ())]
            folder = Path(self.recipe.data.feature_cache)
            self.collator.features = features.prepare(folder, self.base, self.collator, records, self.args, self.screen)

    def has_all_steps(self) -> bool:
        """Whether only the end of the run was lost: HF's loop would make one more step before it sees max_steps."""
        checkpoint = self.folder.checkpoint
        return checkpoint is not None and step_of(checkpoint) == self.batching.steps

    def save(self) -> None:
        """Write the final weights, processor and HF's state at the root of the run folder."""

        with failures.explained(self.args):
            if not self.has_all_steps():
                self.trainer.save_model()
            elif self.args.should_save:
                best = self.trainer.state.best_model_checkpoint if self.args.load_best_model_at_end else None
                checkpoints.copy_results(Path(best or str(self.folder.checkpoint)), self.folder.path)
            self.trainer.save_state()
        if self.args.should_save:
            self.environment["finished"] = datetime.now().astimezone().isoformat(timespec="seconds")
            self.environment["seconds"] = round(time.monotonic() - self.start, 1)
            self.folder.write_json("environment.json", self.environment)

    def evaluate(self) -> None:
        """Start the evaluation that the recipe asks for, once this process has given its memory back."""
        plan = evaluation.commands(self.recipe.eval, model=self.recipe.model, output_dir=self.folder.path)
        if not plan or not self.args.should_save:
            return
        import torch

        del self.trainer, self.built, self.base
        gc.collect()
        torch.cuda.empty_cache()
        for command in plan:
            self.screen.say("python " + " ".join(command))
            if not evaluation.run(command):
                self.failed.append("python " + " ".join(command))

    def close(self) -> int:
        """Write the model card and the report, and say where everything is. Returns the exit code."""
        if self.args.should_save:
            close(self.folder, self.recipe, self.screen, self.request.format)
        for command in self.failed:
            self.screen.warn(f"the evaluation failed, the training is saved; to evaluate again: {command}")
        return 1 if self.failed else 0

    def describe_unfinished(self) -> None:
        """Write the losses so far, the model card and the report of a run that ended before its end."""
        if self.args.should_save and self.trainer is not None:
            try:
                self.trainer.state.save_to_json(str(self.folder.path / "trainer_state.json"))
                write_pages(self.folder, self.recipe, self.screen)
            except OSError as error:  # the disk is full: what ended the run is what the user has to read
                self.screen.warn(f"no report: {error}")

    def describes_start(self) -> bool:
        """Whether policy and spectra are to be written: not where a resumed run finds those of its start."""
        return self.folder.checkpoint is None or not (self.folder.path / "policy.json").is_file()

    def header(self) -> list[tuple[str, str]]:
        """Rows of the header panel."""
        recipe, counted = self.recipe, self.batching
        said, now = self.settings.batch_in_recipe, (counted.per_device, counted.accumulation)
        beside = f"   (recipe: {said[0]} x {said[1]})" if said and said != now else ""
        source = f"   recipe {self.settings.source}" if self.settings.source else ""
        precision = "bf16 autocast" if self.args.bf16 else "fp16 autocast" if self.args.fp16 else "no autocast"
        rows = [
            ("model", f"{recipe.model}{source}"),
            ("data", self.data.describe()),
            ("batch", counted.describe() + beside),
            ("steps", counted.describe_steps()),
            ("dtype", f"{str(self.dtype).removeprefix('torch.')} base, {precision}, on {self.args.device}"),
            ("run", str(self.folder.path)),
        ]
        if self.folder.checkpoint is not None:
            rows.append(("resumed", self.folder.checkpoint.name))
        return rows

    def _warnings(self) -> list[str]:
        found = []
        args, steps = self.args, self.batching.steps
        if args.save_strategy == "steps" and args.save_steps > steps:
            found.append(
                f"save_steps {args.save_steps:g} is beyond the last step ({steps:,}): no checkpoint before the end"
            )
        rates = {rule.get("learning_rate") for rule in self.recipe.policy or () if rule.get("method") == "full"}
        if self.request.edits.method == "full" and any(rate and rate > 5e-5 for rate in rates):
            found.append(
                f"full training at a learning rate of {max(filter(None, rates)):g}; LLaVA uses 2e-5 (--learning_rate)"
            )
        return found
