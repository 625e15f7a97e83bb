"""The host trainer's subclass: one `train()`, with self-play iterations at epoch boundaries.

When an epoch is the first of an iteration, `_run_epoch` has the pairs made (`SelfPlay.begin`) before it trains on a loader
of its own; after an iteration's last epoch it closes the iteration. Everything else is the host's: optimizer step,
logging, evaluation, checkpoints, saving.
"""

from __future__ import annotations

import copy
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from axolotl.core.trainers.base import AxolotlTrainer
from axolotl.utils.logging import get_logger
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from axolotl_spin.compat import WithoutTokenPerplexity
from axolotl_spin.data.pairs import PairDataset
from axolotl_spin.game.health import check_loss, check_step_zero, check_weights, report
from axolotl_spin.game.heldout_play import HeldOutPlay
from axolotl_spin.game.schedule import IterationSchedule, learning_rate_table, restart_optimizer
from axolotl_spin.game.self_play import SelfPlay
from axolotl_spin.generation.backend import Sampling
from axolotl_spin.generation.choice import chosen_backend
from axolotl_spin.monitor.iteration import Progress
from axolotl_spin.monitor.terminal import show_table
from axolotl_spin.ranks.bar import Tally
from axolotl_spin.ranks.peers import Peers
from axolotl_spin.run.checkpoints import read_checkpoint
from axolotl_spin.run.plan import IterationPlan
from axolotl_spin.run.prepare import SpinRun
from axolotl_spin.run.resume import set_aside
from axolotl_spin.run.saving import save_whole, saving
from axolotl_spin.training.batches import pair_loader
from axolotl_spin.training.layout_check import settle_layout
from axolotl_spin.training.layouts import PairCollator
from axolotl_spin.training.logprobs import completion_logps
from axolotl_spin.training.loss import LOSS_AT_START, spin_loss
from axolotl_spin.training.policy import disable_dropout, nonfinite_weights
from axolotl_spin.training.scoring import Scorer

LOG = get_logger(__name__)


class SpinTrainer(AxolotlTrainer, WithoutTokenPerplexity):
    """Trains by self-play once `attach` has given it a run; before that it is the host's trainer (for `evaluate`)."""

    run: SpinRun | None = None
    # the loss below is a mean over the pairs of a step; the Trainer divides it by the accumulation steps (transformers
    # 5.20 asks this attribute; before, the same follows from `_get_num_items_in_batch` giving None)
    loss_is_scaled_for_ga: bool | None = None

    def attach(self, run: SpinRun) -> None:
        """Gives the trainer its run. Called once, after the host has built the trainer.

        Args:
            run: Settings, prompts, plan.
        """
        self.run = run
        self.progress = Progress(run.directory, self.accelerator)
        self._pairs: PairDataset | None = None
        self._pairs_in_step: Tensor | None = None
        self._step_zero_due = False
        self._peers = Peers()
        self._resumed: dict[str, Any] | None = None
        if switched_off := disable_dropout(self.accelerator.unwrap_model(self.model)):
            LOG.info(f"dropout is off, so that policy and opponent agree at step 0: {', '.join(switched_off)}")
        tokenizer = run.tokenizer
        pad = (tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id) or 0
        generation = run.settings.generation
        sampling = Sampling(generation.temperature, generation.top_p, generation.top_k, run.stop_tokens(self.model))
        LOG.info(
            f"answers end with {', '.join(repr(tokenizer.decode([t])) for t in sampling.stop_token_ids) or 'nothing'}"
        )
        self._collator, self._layout_settled = PairCollator(pad), False
        micro_batch, gather = self.args.per_device_train_batch_size, generation.gather_weights
        scorer = Scorer(self.accelerator, self._collator, micro_batch, gather, self._peers.check)
        tally = Tally(self._peers, self.accelerator.is_main_process)
        save, optimizer = partial(save_whole, self), lambda: self.optimizer
        backend = chosen_backend(
            generation,
            run.served,
            run.directory,
            self.accelerator,
            sampling,
            pad,
            tally,
            save=save,
            optimizer=optimizer,
        )
        self.self_play = SelfPlay(run, self.accelerator, backend, scorer, self._peers, tally)
        self.held_out = HeldOutPlay(run, self, sampling, pad, scorer, self._peers.check)

    # -- the loop -----------------------------------------------------------------------------------------------------

    def _run_epoch(self, model: Any, epoch: int, train_dataloader: Any, **kwargs: Any) -> None:  # type: ignore[override]
        run = self.run
        if run is None:
            return super()._run_epoch(model=model, epoch=epoch, train_dataloader=train_dataloader, **kwargs)
        entry = run.plan.of_epoch(epoch)
        with self._peers:
            if self._pairs is None or epoch == run.plan.first_epoch(entry):
                self._begin_iteration(entry, model)
            loader = self._pair_loader(self._pairs, epoch)
            self.callback_handler.train_dataloader = loader
            kwargs.update(steps_in_epoch=len(loader), num_update_steps_per_epoch=entry.steps_per_epoch)
            super()._run_epoch(model=model, epoch=epoch, train_dataloader=loader, **kwargs)
            if self.state.global_step == entry.first_step + entry.steps:
                self._end_iteration(entry)

    def _begin_iteration(self, entry: IterationPlan, model: Any) -> None:
        assert self.run is not None
        fresh = self.state.global_step == entry.first_step
        self._settle_layout(model)
        self._pairs, figures = self.self_play.begin(entry, model, fresh)
        if fresh:
            start = self.held_out.before() if entry.iteration == 0 else {}
            self.progress.begin(entry, figures)
            self.log({name: value for name, value in self.progress.record.figures.items() if value is not None})
            self.progress.record.figures.update(start)
            self._step_zero_due = True
            if entry.iteration > 0 and self.run.settings.restart_optimizer:
                restart_optimizer(self.optimizer)
        self.progress.write()

    def _settle_layout(self, model: Any) -> None:
        if self.run is not None and not self._layout_settled:
            self._layout_settled = True
            half = self.args.bf16 or self.args.fp16
            line = settle_layout(
                self._collator,
                model,
                self.run.prompts,
                self.accelerator,
                sample_packing=self.run.sample_packing,
                longest=self.run.sequence_len,
                half=half,
            )
            LOG.info(line)

    def _end_iteration(self, entry: IterationPlan) -> None:
        assert self.run is not None
        self.log(self.progress.end())
        record = self.progress.record
        if self.eval_dataset is not None and record.evaluated_at != self.state.global_step:
            self.evaluate()
        self._refuse_nonfinite_weights()
        if self.run.settings.save_iterations:
            save_whole(self, self.run.directory.model(entry.iteration))
        self._settle_layout(self.model_wrapped)  # an iteration that a resume closes has not begun in this start
        record.figures.update(self.held_out.after(entry))
        self.progress.write()
        if self.accelerator.is_main_process:
            LOG.info(record.line())
            show_table(self.run, entry)
        self.self_play.end(entry)
        self._pairs = None

    # -- data ---------------------------------------------------------------------------------------------------------

    def _pair_loader(self, pairs: Any, epoch: int) -> DataLoader:
        assert self.run is not None
        return pair_loader(
            pairs,
            self._collator,
            self.args,
            ranks=self.accelerator.num_processes,
            rank=self.accelerator.process_index,
            seed=self.run.seed,
            epoch=epoch,
            shuffle=self.run.shuffle,
        )

    def get_train_dataloader(self) -> DataLoader:
        """Returns a loader of iteration 0's length, never iterated: its pairs do not exist before the model answers."""
        if self.run is None:
            return super().get_train_dataloader()
        return self._pair_loader(range(self.run.plan.iterations[0].rows), epoch=0)

    def set_initial_training_values(self, args: Any, dataloader: Any) -> tuple:
        """Returns the whole run's epochs and steps; see `transformers.Trainer`."""
        if self.run is None:
            return super().set_initial_training_values(args, dataloader)
        return self.run.plan.training_values(len(dataloader))

    def _init_training_state(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        epochs, batches = super()._init_training_state(*args, **kwargs)
        if self.run is None:
            return epochs, batches
        folder = kwargs.get("resume_from_checkpoint", args[3] if len(args) > 3 else None)
        self._resumed = read_checkpoint(Path(folder)).state if folder else None
        position = self.run.plan.locate(self.state.global_step)
        if self.accelerator.is_main_process:
            self.run.write_plan()
            for path in set_aside(self.run, self.state.global_step):
                LOG.info(f"made by a run that got further than where this one starts; now in {path}")
        self.accelerator.wait_for_everyone()
        return position.epoch, position.step_in_epoch * self.args.gradient_accumulation_steps

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Moves a pair batch to the device without DeepSpeed's cast: a log-prob of -200 in bf16 is off by up to 0.5."""
        if "completion_lengths" not in inputs:
            return super()._prepare_inputs(inputs)
        return {key: value.to(self.args.device, non_blocking=True) for key, value in inputs.items()}

    # -- schedule -----------------------------------------------------------------------------------------------------

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> LRScheduler:
        """Makes the schedule that restarts warmup and decay at each iteration; see `transformers.Trainer`."""
        if self.run is None:
            return super().create_scheduler(num_training_steps, optimizer=optimizer)
        schedule: Any = self.lr_scheduler
        if schedule is None:
            rates = learning_rate_table(self.run.plan, self._host_scheduler)
            target: Any = self.optimizer if optimizer is None else optimizer
            schedule = IterationSchedule(target, rates, self.args.learning_rate)
            self.lr_scheduler = schedule
            self._created_lr_scheduler = True
        return schedule

    def _host_scheduler(self, entry: IterationPlan, optimizer: torch.optim.Optimizer) -> LRScheduler:
        """Makes the host's scheduler for one iteration, on a copy: nothing of this trainer changes."""
        trainer = copy.copy(self)
        trainer.run, trainer.lr_scheduler, trainer.optimizer = None, None, optimizer
        trainer.args = copy.copy(self.args)
        trainer.args.learning_rate = entry.learning_rate
        trainer.args.warmup_steps = entry.warmup_steps
        return trainer.create_scheduler(entry.steps, optimizer=optimizer)

    # -- loss ---------------------------------------------------------------------------------------------------------

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Any:
        """Counts the pairs of a step over all ranks and micro-batches; evaluation batches are the host's."""
        if not batch_samples or "completion_lengths" not in batch_samples[0]:
            return super()._get_num_items_in_batch(batch_samples, device)
        count = torch.stack([batch["weight"].sum() for batch in batch_samples]).sum().to(device)
        self._pairs_in_step = self._sum_over_ranks(count)
        return None

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Computes the SPIN loss of a pair batch (eq. 4.7); plain SFT rows go to the host's loss, for evaluation.

        The loss is scaled so that, after the Trainer's division by the accumulation steps and the average of gradients
        over ranks, each pair of the step has the same weight, however many pairs the last batch has.
        """
        if "completion_lengths" not in inputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        assert self.run is not None
        settings = self.run.settings
        entry = self.progress.record.plan
        logps = completion_logps(model, inputs, self._collator.in_head)
        chosen, rejected = logps.chunk(2)
        opponent_chosen, opponent_rejected = inputs["opponent_logps"].to(logps.dtype).chunk(2)
        result = spin_loss(
            chosen, rejected, opponent_chosen, opponent_rejected, beta=entry.beta, loss_type=settings.loss
        )
        step = self.state.global_step
        report(check_loss(result.losses, logps, step=step, iteration=entry.iteration), main=True)
        if self._step_zero_due:
            self._check_step_zero(result.losses, logps, inputs)
        losses = result.losses
        if settings.sft_weight:
            losses = losses - settings.sft_weight * chosen / inputs["completion_lengths"].chunk(2)[0]
        weight = inputs["weight"].to(losses.dtype)
        self.progress.metrics.add(step, result, chosen, rejected, weight)
        assert self._pairs_in_step is not None
        share = self.accelerator.num_processes * self.current_gradient_accumulation_steps / self._pairs_in_step
        return (losses * weight).sum() * share

    def _check_step_zero(self, losses: Tensor, logps: Tensor, inputs: dict[str, Tensor]) -> None:
        """At an iteration's first step policy and opponent are one model, so every pair's loss is l(0)."""
        assert self.run is not None
        self._step_zero_due = False
        entry = self.progress.record.plan
        half = self.args.bf16 or self.args.fp16 or self.is_deepspeed_enabled
        off = (logps.detach() - inputs["opponent_logps"]).abs() / inputs["completion_lengths"]
        real = inputs["weight"] > 0
        findings = check_step_zero(
            losses.detach()[real],
            off.view(2, -1).mean(0)[real],
            expected=LOSS_AT_START[self.run.settings.loss],
            tolerance=0.05 * max(1.0, entry.beta) if half else 1e-3,
            iteration=entry.iteration,
        )
        report(findings, main=True)

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model: Any, trial: Any, **kwargs: Any) -> None:
        if self.run is None:
            return super()._save_checkpoint(model, trial, **kwargs)
        self._refuse_nonfinite_weights()
        step = self.state.global_step
        folder = Path(self._get_output_dir(trial=trial), f"{PREFIX_CHECKPOINT_DIR}-{step}")
        loss_sum = self._sum_over_ranks(self._tr_loss.detach().clone()) / self.accelerator.num_processes
        logged = {"sum": loss_sum.item(), "total": self._total_loss_scalar, "at": self._globalstep_last_logged}
        mark = {
            "run": self.run.identity.through(self.progress.record.plan.iteration),
            "step": step,
            **asdict(self.run.launch),
            "resumable": not self.args.save_only_model,
            "state": {**self.progress.state(), "logged_loss": logged},
        }
        with saving(self, folder, root=self.run.directory.root, mark=mark):
            super()._save_checkpoint(model, trial, **kwargs)

    def take_up(self) -> None:
        """Goes on from what `_save_checkpoint` kept beside the host's files; called when training begins.

        Where the checkpoint is an iteration's last step, the run may have been stopped before that iteration was closed:
        it is closed (again), which gives the same figures.
        """
        state = self._resumed
        if self.run is None or state is None:
            return
        entry = self.run.plan.iterations[state["iteration"]]
        self.progress.restore(state, entry)
        logged = state["logged_loss"]
        self._tr_loss = torch.tensor(logged["sum"], device=self.args.device)
        self._globalstep_last_logged = logged["at"]
        self.args.eval_on_start = False  # the whole run's start is behind
        schedule: Any = self.lr_scheduler
        getattr(schedule, "scheduler", schedule).reapply()
        if not hasattr(self, "_initial_global_step"):  # transformers 5.20 averages over the steps of one start
            self._total_loss_scalar = logged["total"]
        if self.state.global_step == entry.first_step + entry.steps:
            with self._peers:
                self._end_iteration(entry)

    def _refuse_nonfinite_weights(self) -> None:
        bad = nonfinite_weights(self.accelerator.unwrap_model(self.model))
        report(check_weights(bad, step=self.state.global_step), main=True)

    # -- logging ------------------------------------------------------------------------------------------------------

    def _sum_over_ranks(self, value: Tensor) -> Tensor:
        return self.accelerator.reduce(value, "sum")

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the pair metrics to what the Trainer logs."""
        if self.run is not None and self.progress.begun:
            self.progress.note(logs, self.state.global_step)
        super().log(logs, start_time)
