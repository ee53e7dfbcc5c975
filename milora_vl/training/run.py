"""One training run, step by step; `milora_vl.train` tells them in order."""

from __future__ import annotations

import gc
import os
import signal
import time
from datetime import datetime
from pathlib import Path
from typing import Any

from milora_data.errors import UserError
from milora_vl.training import (
    checkpoints,
    evaluation,
    header,
    hub,
    packages,
    resuming,
    run_data,
    run_folder,
    settings,
    training_args,
)
from milora_vl.training.arguments import Request
from milora_vl.training.batching import Batching
from milora_vl.training.checkpoints import step_of
from milora_vl.training.screen import Screen, policy_rows, trainable_line


class Run:
    """State of one run. Everything that can be wrong is found before the model loads."""

    def __init__(self, request: Request) -> None:
        self.start = time.monotonic()
        self.screen = Screen()
        self.request = request
        self.trainer: Any = None
        self.probe: Any = None
        self.spectra: Any = None  # measured at the start of a run alone
        self.push_failed = False
        self.failed: list[str] = []  # evaluations that did not come to their end
        self.settings = settings.resolve(request)
        self.recipe, self.hub_token = hub.without_token(self.settings.recipe)
        path = Path(request.output_dir) if request.output_dir else run_folder.default_path(self.recipe, datetime.now())
        self.folder = run_folder.choose(path, request.resume)
        packages.check(self.recipe.train, self.recipe.quantization, self.recipe.attn_implementation)
        for note in self.settings.notes:
            self.screen.say(note)
        for warning in self.settings.warnings:
            self.screen.warn(warning)

    def check_resumed(self) -> None:
        """Refuse to continue a run with settings that it was not trained with; find the changes that it may have."""
        self.resumed = resuming.Resumed(self.folder, self.request.resume)
        processes, implicit = int(os.environ.get("WORLD_SIZE", "1")), self.settings.implicit_policy
        for warning in self.resumed.compare(self.recipe, implicit_policy=implicit, processes=processes):
            self.screen.warn(warning)

    def is_done(self) -> bool:
        """Whether `--resume_from_checkpoint auto` finds a finished run: a requeued job has nothing left to do."""
        if not self.resumed.is_done():
            return False
        self.screen.say(f"{self.folder.path} is finished; nothing to resume")
        return True

    def check_policy(self) -> None:
        """Find out by the model's config, before anything is read, what the rules say wrongly of it."""
        settings.require_fit(self.request, self.recipe)

    def check_hub(self) -> None:
        """Find out whether the run could push its files, where it is to."""
        hub.check(self.recipe.train, self.folder.path, self.hub_token)

    def read_data(self) -> None:
        """Read and check the records, and settle HF's arguments and the number of steps."""
        with self.screen.step(f"reading {run_data.describe(self.recipe.data)}"):
            self.data = run_data.read(self.recipe.data)
        self.resumed.require_same_records(self.data)
        self.args, warnings = training_args.make(self.recipe, self.folder.path)
        self._count_steps(None if self.recipe.data.streaming else len(self.data.train))
        if self.folder.checkpoint is not None:
            stage = training_args.zero_stage(self.args)
            warnings += resuming.check(self.folder.checkpoint, processes=self.args.world_size, stage=stage)
        warnings += header.warnings(self.args, self.batching)
        for warning in [*self.data.warnings(), *warnings]:
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
        if self.folder.checkpoint is not None:
            resuming.require_same_steps(self.folder.checkpoint, self.recipe, self.batching.steps)

    def check_evaluation(self) -> None:
        """Find out now what loading the model, or the evaluation after the training, would stumble over."""
        from milora_vl.training import bases

        evaluation.check(self.recipe.eval)
        bases.check(self.recipe)

    def load_model(self) -> None:
        """Load the base model and its processor."""
        from milora_vl.training import bases, build

        with self.args.main_process_first(desc="composing the base"):
            self.recipe, line = bases.settled(self.recipe)
        self.dtype = training_args.base_dtype(self.recipe, self.recipe.train)
        if line:
            self.screen.say(line)
        device, first = training_args.load_device(self.args), self.data.train[:100]
        with self.screen.step(f"loading {self.recipe.model}"):
            self.base, self.processor = build.load_base(self.recipe, self.dtype, device, first)
        self.recipe = build.rules_for(self.recipe, self.base, implicit=self.settings.implicit_policy)
        for warning in build.model_warnings(self.recipe, self.base, self.processor):
            self.screen.warn(warning)
        if self.recipe.eval.forgetting_every:
            from milora_vl.training.forgetting import Probe

            with self.screen.step("keeping the base's predictions, for forgetting"):
                self.probe = Probe(self.base, self.processor)

    def arrange_data(self) -> None:
        """Count tokens where the recipe groups records by length, and pack them where it asks for that."""
        from milora_vl.training import run_files

        self.items: Any = self.data.train
        self.lengths = run_files.lengths(self.recipe, self.base, self.processor, self.data.train)
        if self.recipe.data.packing:
            assert self.lengths is not None
            self.items, line = run_files.packed(self.recipe, self.data.train, self.lengths)
            self.lengths = None
            self.screen.say(line)
            self._count_steps(len(self.items))
        if self.recipe.data.streaming:
            from milora_vl.training import streaming

            self.items = streaming.stream_of(self.recipe, self.args)
            self.args.ignore_data_skip = True  # a resumed stream is where it was

    def apply_policy(self) -> None:
        """Make the adapters, or put a checkpoint's back; nothing of the base changes in the anchored form."""
        from transformers import set_seed

        from milora_vl.spectrum import layer_spectra
        from milora_vl.training import build, rates

        targets = build.targets_of(self.recipe, self.base)
        for warning in rates.warnings(targets, self.recipe.train, method=self.request.edits.method):
            self.screen.warn(warning)
        targets = rates.in_force(targets, self.recipe.train)
        if self.describes_start():
            with self.screen.step("measuring the spectrum of one layer per tower"):
                self.spectra = layer_spectra(self.base, targets)
        set_seed(self.args.seed)  # LoRA starts from random numbers, here as in HF's example scripts
        checkpoint, dtype = self.folder.checkpoint, training_args.trained_dtype(self.args)
        with self.screen.step("applying the policy" if checkpoint is None else f"restoring {checkpoint}"):
            self.built = build.build(self.recipe, self.base, targets, checkpoint, dtype)
        if self.args.gradient_checkpointing:
            self.built.model.enable_input_require_grads()  # frozen embeddings would cut the graph

    def open_folder(self) -> None:
        """Show the header and the policy, and gather what is written when the first step begins."""
        from milora_vl.training import run_files
        from milora_vl.training.opening import Opening

        known = (self.settings, self.recipe.model, self.data, self.batching, self.args, self.dtype, self.folder)
        self.screen.header(header.rows(*known))
        self.screen.policy(policy_rows(self.built.targets, self.built.sizes, self.built.report), self.built.frozen)
        self.screen.say(trainable_line(self.built.model))
        run_files.set_chat_template(self.processor, self.recipe.template)
        if self.resumed.changes:
            self.screen.say(f"changed since {self.folder.checkpoint}: {'; '.join(map(str, self.resumed.changes))}")
        self.environment = run_folder.describe_environment(
            self.recipe,
            ["python", "-m", "milora_vl.train", *hub.hidden_token(self.request.words)],
            base=run_files.base_name(self.base) or self.recipe.model,
            device=run_files.device_name(self.args.device),
            data=self.data,
            dtype=str(self.dtype).removeprefix("torch."),
            processes=self.args.world_size,
        )
        if self.folder.checkpoint is not None:
            self.environment = self.resumed.continued(self.environment)
        start = {"policy.json": run_files.policy_json(self.built), "spectrum.json": self.spectra}
        self.opening = Opening(
            folder=self.folder,
            recipe=self.recipe,
            environment=self.environment,
            content=start if self.describes_start() else {},
            screen=self.screen,
            is_writer=self.args.should_save,
        )

    def train(self) -> None:
        """Train with HF's Trainer; where no step begins, nothing is left in the run folder."""
        try:
            self._make_trainer()
            self._train()
        finally:
            self.opening.remove_empty_folders()

    def _make_trainer(self) -> None:
        from milora_vl.trainer import MiloraTrainer
        from milora_vl.training import run_files
        from milora_vl.training.opening import AtFirstStep

        self.collator = run_files.collator(self.recipe, self.base, self.processor, self.data.train[:100])
        self._use_feature_cache()
        hub.open_repository(self.args)
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
        self.trainer.add_callback(AtFirstStep(self.opening.begin))
        if self.probe is not None and self.recipe.eval.forgetting_every:
            from milora_vl.training.forgetting import ForgettingCallback

            self.trainer.add_callback(ForgettingCallback(self.probe, self.recipe.eval.forgetting_every, self.trainer))

    def _train(self) -> None:
        """Make the steps; a keyboard interrupt says how to go on."""
        from peft.helpers import disable_input_dtype_casting
        from transformers import TrainerState

        from milora_vl.training import failures, run_files
        from milora_vl.training.launch import calls_on_sigterm

        checkpoint = self.folder.checkpoint
        if checkpoint is not None and self.has_all_steps():
            self.opening.begin()
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
        for warning in run_files.warnings_of(self.collator):
            self.screen.warn(warning)

    def _use_feature_cache(self) -> None:
        """Let batches hold what the frozen tower makes of the pictures, where the recipe names a folder for it."""
        if self.recipe.data.feature_cache:
            from milora_vl.training import features

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
        from milora_vl.training import failures

        with failures.explained(self.args):
            if not self.has_all_steps():
                self.trainer.save_model(_internal_call=True)  # pushed when the pages are there too
            elif self.args.should_save:
                best = self.trainer.state.best_model_checkpoint if self.args.load_best_model_at_end else None
                checkpoints.copy_results(Path(best or str(self.folder.checkpoint)), self.folder.path)
            self.trainer.save_state()
        if self.args.should_save:
            self.environment["finished"] = datetime.now().astimezone().isoformat(timespec="seconds")
            self.environment["seconds"] = round(time.monotonic() - self.start, 1)
            self.folder.write_json("environment.json", self.environment)
            self.repository = self.trainer.hub_model_id
            for reason in self.trainer.failed_pushes():
                self.screen.warn(f"a push during the training failed: {reason}")

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
            from milora_vl.training.closing import close

            close(self.folder, self.recipe, self.screen, self.request.format)
            if self.args.push_to_hub:
                self._push()
        for command in self.failed:
            self.screen.warn(f"the evaluation failed, the training is saved; to evaluate again: {command}")
        return 1 if self.failed or self.push_failed else 0

    def _push(self) -> None:
        try:
            with self.screen.step(f"pushing to {self.repository}"):
                self.screen.say(f"pushed   {hub.push(self.folder.path, self.repository, self.args.hub_revision)}")
        except UserError as error:
            self.push_failed = True
            self.screen.warn(str(error))

    def describe_unfinished(self) -> None:
        """Write the losses so far, the model card and the report of a run that ended before its end."""
        if self.args.should_save and self.opening.has_begun:
            from milora_vl.training.closing import write_pages

            try:
                self.trainer.state.save_to_json(str(self.folder.path / "trainer_state.json"))
                write_pages(self.folder, self.recipe, self.screen)
            except OSError as error:  # the disk is full: what ended the run is what the user has to read
                self.screen.warn(f"no report: {error}")

    def describes_start(self) -> bool:
        """Whether policy and spectra are to be written: not where a resumed run finds those of its start."""
        return self.folder.checkpoint is None or not (self.folder.path / "policy.json").is_file()
