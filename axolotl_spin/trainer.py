"""The host trainer's subclass: what the host calls, handed to the self-play loop (`game/loop.py`).

Optimizer step, logging, evaluation, checkpoints and saving are the host's.
"""

from __future__ import annotations

import copy
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from axolotl.core.trainers.base import AxolotlTrainer
from axolotl.utils.logging import get_logger
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from axolotl_spin.compat import PairTrainer
from axolotl_spin.game.loop import Loop
from axolotl_spin.game.schedule import IterationSchedule, OptimizerStart, learning_rate_table, tell_groups_apart
from axolotl_spin.run.checkpoints import read_checkpoint
from axolotl_spin.run.plan import IterationPlan
from axolotl_spin.run.prepare import SpinRun
from axolotl_spin.run.regrouping import make_universal, read_universal, remove_universal
from axolotl_spin.run.restoring import restore
from axolotl_spin.run.resume import set_aside
from axolotl_spin.run.saving import saving
from axolotl_spin.training.evaluation import TokenLoss

LOG = get_logger(__name__)


class SpinTrainer(TokenLoss, AxolotlTrainer, PairTrainer):
    """Trains by self-play once `attach` has given it a run; before that it is the host's trainer (for `evaluate`)."""

    loop: Loop | None = None
    optimizer_start: OptimizerStart | None = None

    def attach(self, run: SpinRun) -> None:
        """Gives the trainer its run. Called once, after the host has built the trainer.

        Args:
            run: Settings, prompts, plan.
        """
        self.loop = Loop(run, self)
        self._pairs_in_step: Tensor | None = None
        self._resumed: dict[str, Any] | None = None
        if run.regrouped is not None:
            with self.loop.ranks as ranks:
                ranks.on_main(partial(make_universal, run.regrouped))
            read_universal(self.accelerator.state.deepspeed_plugin)

    def bring(self, checkpoint: str) -> None:
        """Brings the checkpoint that a start goes on from to nodes that do not see rank 0's folder.

        Args:
            checkpoint: Where it is to be found on this rank.
        """
        assert self.loop is not None
        with self.loop.ranks:
            self.loop.ranks.ferry.send(Path(checkpoint), keep=False)

    # -- epochs and data ----------------------------------------------------------------------------------------------

    def _run_epoch(self, model: Any, epoch: int, train_dataloader: Any, **kwargs: Any) -> None:  # type: ignore[override]
        host = super()._run_epoch
        if self.loop is None:
            return host(model=model, epoch=epoch, train_dataloader=train_dataloader, **kwargs)

        def train(loader: DataLoader, entry: IterationPlan) -> None:
            self.callback_handler.train_dataloader = loader
            kwargs.update(steps_in_epoch=len(loader), num_update_steps_per_epoch=entry.steps_per_epoch)
            host(model=model, epoch=epoch, train_dataloader=loader, **kwargs)

        self.loop.epoch(epoch, model, train)

    def get_train_dataloader(self) -> DataLoader:
        """Returns a loader of iteration 0's length, never iterated: its pairs do not exist before the model answers."""
        if self.loop is None:
            return super().get_train_dataloader()
        first = self.loop.run.plan.iterations[0]
        return self.loop.loader(range(first.rows), first, epoch=0)

    def set_initial_training_values(self, args: Any, dataloader: Any) -> tuple:
        """Returns the whole run's epochs and steps; see `transformers.Trainer`."""
        if self.loop is None:
            return super().set_initial_training_values(args, dataloader)
        return self.loop.run.plan.training_values(len(dataloader))

    def _init_training_state(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        epochs, batches = super()._init_training_state(*args, **kwargs)
        if self.loop is None:
            return epochs, batches
        run = self.loop.run
        # the Trainer goes by the state, which it has replaced by a checkpoint's: `save_steps` and the like may be others
        self.state.compute_steps(self.args, run.plan.total_steps)
        # a checkpoint of an earlier version may have them: the host would remove all checkpoints but that one at the end
        self.state.best_global_step = self.state.best_model_checkpoint = None
        folder = self.resume_folder(args, kwargs)
        self._resumed = read_checkpoint(Path(folder)).state if folder else None
        position = run.plan.locate(self.state.global_step)
        if self.accelerator.is_main_process:
            run.write_plan()
            for path in set_aside(run, self.state.global_step):
                LOG.info(f"made by a run that got further than where this one starts; now in {path}")
        self.accelerator.wait_for_everyone()
        return position.epoch, position.step_in_epoch * self.args.gradient_accumulation_steps

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Moves a pair batch to the device without DeepSpeed's cast: a log-prob of -200 in bf16 is off by up to 0.5."""
        if "completion_lengths" not in inputs:
            return super()._prepare_inputs(inputs)
        return {key: value.to(self.args.device, non_blocking=True) for key, value in inputs.items()}

    # -- schedule -----------------------------------------------------------------------------------------------------

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Makes the host's optimizer, and notes what it holds, to which each iteration brings it back."""
        optimizer = super().create_optimizer(model=model)
        if self.loop is not None and self.optimizer_start is None:
            self.optimizer_start = OptimizerStart(optimizer)
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> LRScheduler:
        """Makes the schedule that restarts warmup and decay at each iteration; see `transformers.Trainer`."""
        if self.loop is None:
            return super().create_scheduler(num_training_steps, optimizer=optimizer)
        schedule: Any = self.lr_scheduler
        if schedule is None:
            rates = learning_rate_table(self.loop.run.plan, self._host_scheduler)
            target: Any = self.optimizer if optimizer is None else optimizer
            schedule = IterationSchedule(target, rates, self.args.learning_rate)
            self.lr_scheduler = schedule
            self._created_lr_scheduler = True
        return schedule

    @property
    def schedule(self) -> IterationSchedule:
        """The run's, without a wrapper around it."""
        schedule: Any = self.lr_scheduler
        return getattr(schedule, "scheduler", schedule)

    def _host_scheduler(self, entry: IterationPlan, optimizer: torch.optim.Optimizer) -> LRScheduler:
        """Makes the host's scheduler for one iteration, on a copy: nothing of this trainer changes."""
        trainer = copy.copy(self)
        trainer.loop, trainer.lr_scheduler, trainer.optimizer = None, None, optimizer
        trainer.args = copy.copy(self.args)
        trainer.args.learning_rate = entry.learning_rate
        trainer.args.warmup_steps = entry.warmup_steps
        return trainer.create_scheduler(entry.schedule_steps, optimizer=optimizer)

    # -- loss ---------------------------------------------------------------------------------------------------------

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Any:
        """Counts the pairs of a step over all ranks and micro-batches; evaluation batches are the host's."""
        if not batch_samples or "completion_lengths" not in batch_samples[0]:
            return super()._get_num_items_in_batch(batch_samples, device)
        count = torch.stack([batch["weight"].sum() for batch in batch_samples]).sum().to(device)
        self._pairs_in_step = self.accelerator.reduce(count, "sum")
        return None

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Computes the SPIN loss of a pair batch; plain SFT rows go to the host's loss, for evaluation.

        The loss is scaled so that, after the Trainer's division by the accumulation steps and the average of gradients
        over ranks, each pair of the step has the same weight, however many pairs the last batch has.
        """
        if "completion_lengths" not in inputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        assert self.loop is not None and self._pairs_in_step is not None
        share = self.accelerator.num_processes * self.current_gradient_accumulation_steps / self._pairs_in_step
        return self.loop.losses(model, inputs) * share

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model: Any, trial: Any, **kwargs: Any) -> None:
        if self.loop is None:
            return super()._save_checkpoint(model, trial, **kwargs)
        self.loop.refuse_nonfinite_weights()
        step, run, progress = self.state.global_step, self.loop.run, self.loop.progress
        folder = Path(self._get_output_dir(trial=trial), f"{PREFIX_CHECKPOINT_DIR}-{step}")
        loss_sum = self.accelerator.reduce(self._tr_loss.detach().clone(), "sum") / self.accelerator.num_processes
        logged = {"sum": loss_sum.item(), "total": self._total_loss_scalar, "at": self._globalstep_last_logged}
        mark = {
            "run": run.identity.through(progress.record.plan.iteration),
            "step": step,
            **asdict(run.launch),
            "resumable": not self.args.save_only_model,
            "state": {**progress.state(), "logged_loss": logged},
        }
        restarts = run.settings.restart_optimizer and self.loop.ended(progress.record.plan)
        with saving(self, folder, root=run.directory.root, mark=mark, restarts=restarts, ferry=self.loop.ranks.ferry):
            super()._save_checkpoint(model, trial, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Restores weights that are saved in another form than they have in memory; all others the Trainer restores."""
        whole = self.accelerator.unwrap_model(self.model if model is None else model, keep_torch_compile=False)
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled  # whose checkpoints are in the form of the memory
        if self.loop is None or sharded or not restore(whole, Path(resume_from_checkpoint)):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def take_up(self) -> None:
        """Goes on from what `_save_checkpoint` kept beside the host's files; called when training begins.

        Where the checkpoint is an iteration's last step, the run may have been stopped before that iteration was closed:
        it is closed (again), which gives the same figures.
        """
        state, loop = self._resumed, self.loop
        if loop is None or state is None:
            return
        if loop.run.regrouped is not None:
            loop.ranks.wait()  # all have read it
            if loop.ranks.main:
                remove_universal(loop.run.regrouped)
            assert self.optimizer_start is not None
            tell_groups_apart(self.optimizer, self.optimizer_start)
        entry = loop.run.plan.iterations[state["iteration"]]
        loop.progress.restore(state, entry)
        logged = state["logged_loss"]
        self._tr_loss = torch.tensor(logged["sum"], device=self.args.device)
        self._globalstep_last_logged = logged["at"]
        self.args.eval_on_start = False  # the whole run's start is behind
        self.schedule.at(self.state.global_step)
        if not self.averages_over_this_start:
            self._total_loss_scalar = logged["total"]
        if loop.ended(entry):
            with loop.ranks:
                loop.end(entry)

    def evaluated(self, loss: float, stderr: float | None, rows: dict[str, np.ndarray]) -> None:
        """Keeps each held-out row's NLL; see `TokenLoss`."""
        if self.loop is not None:
            self.loop.outcome.evaluated(loss, stderr, rows)

    # -- logging ------------------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the pair metrics to what the Trainer logs."""
        if self.loop is not None and self.loop.progress.begun:
            logs = self.loop.progress.note(logs, self.state.global_step)
        super().log(logs, start_time)
