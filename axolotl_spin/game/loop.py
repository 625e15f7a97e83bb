"""The self-play loop, at the epoch boundaries of the host's one `train()`.

begin    the policy answers every prompt, is frozen as the opponent and scores both answers; the pairs are on disk
epochs   the host trains on them: `num_epochs` passes of its own optimizer, logging, evaluation and checkpoints
end      figures, evaluation, the iteration's model, held-out play, benchmarks, and whether it is the best; then the next
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from axolotl.utils.logging import get_logger
from torch import Tensor
from torch.utils.data import DataLoader

from axolotl_spin.data.pairs import PairDataset
from axolotl_spin.evals.in_training import PolicyBenchmarks
from axolotl_spin.game.health import act_on, check_loss, check_step_zero, check_weights
from axolotl_spin.game.heldout_play import HeldOutPlay
from axolotl_spin.game.noise import refuse_noise
from axolotl_spin.game.outcome import Outcome
from axolotl_spin.game.schedule import restart_optimizer
from axolotl_spin.game.self_play import SelfPlay
from axolotl_spin.game.thumbnails import keep_thumbnails
from axolotl_spin.game.updates import UpdateWatch
from axolotl_spin.generation.backend import Sampling
from axolotl_spin.generation.choice import chosen_backend
from axolotl_spin.monitor.iteration import Progress
from axolotl_spin.monitor.terminal import show_table
from axolotl_spin.ranks.bare import bare
from axolotl_spin.ranks.main import Ranks
from axolotl_spin.run.plan import IterationPlan
from axolotl_spin.run.prepare import SpinRun
from axolotl_spin.run.saving import save_whole
from axolotl_spin.settings.spin import LOSS_AT_START
from axolotl_spin.training.batches import MicroBatches, pair_loader
from axolotl_spin.training.layout_check import settle_layout
from axolotl_spin.training.layouts import PairCollator, token_multiple
from axolotl_spin.training.noise import disable_dropout
from axolotl_spin.training.policy import nonfinite_weights, refuse_untrained
from axolotl_spin.training.quantised import compute_as_in_training
from axolotl_spin.training.routers import leave_out_router_logits
from axolotl_spin.training.scoring import Scorer
from axolotl_spin.training.step import pair_losses
from axolotl_spin.training.towers import freeze_towers

LOG = get_logger(__name__)

# has the host train for an epoch on a loader, in an iteration
Train = Callable[[DataLoader, IterationPlan], None]


class Loop:
    """Plays a run's iterations, over all ranks.

    Args:
        run: Settings, prompts and plan.
        trainer: The host's: model, optimizer, state, logging, evaluation, saving.
    """

    def __init__(self, run: SpinRun, trainer: Any):
        self.run, self.trainer = run, trainer
        self.ranks = Ranks(trainer.accelerator, run.nodes)
        self.progress = Progress(run.directory, self.ranks)
        self.outcome = Outcome(run, trainer, self.ranks, self.progress)
        self.updates = UpdateWatch(trainer, self.ranks, self.progress)
        policy = bare(trainer.model, self.ranks.accelerator)
        if switched_off := disable_dropout(policy):
            LOG.info(f"dropout is off, so that policy and opponent agree at step 0: {', '.join(switched_off)}")
        compute_as_in_training(policy)
        # pictures reach a tower as they do in SFT, which trains it unless a key says otherwise
        if run.images is None and (towers := freeze_towers(policy)):
            LOG.info(f"text does not reach {', '.join(towers)}: they stay as they are")
        refuse_untrained(policy, adapter=hasattr(policy, "peft_config"))
        if leave_out_router_logits(policy):
            LOG.warning(
                "`output_router_logits: true` in the model's config: the auxiliary loss that balances experts is no part "
                "of SPIN's, and is left out"
            )
        generation, tokenizer = run.settings.generation, run.tokenizer
        pad = (tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id) or 0
        sampling = Sampling(generation.temperature, generation.top_p, generation.top_k, run.stop_tokens(policy))
        ends = ", ".join(repr(tokenizer.decode([token])) for token in sampling.stop_token_ids)
        LOG.info(f"answers end with {ends or 'nothing'}")
        self.collator = PairCollator(pad)
        self.collator.multiple = token_multiple(self.ranks.accelerator.mixed_precision)
        scorer = Scorer(self.ranks, self.collator, generation.gather_weights)
        save, optimizer = partial(save_whole, trainer, private=True), lambda: trainer.optimizer
        backend = chosen_backend(
            generation, run.served, run.directory, self.ranks, sampling, pad, save=save, optimizer=optimizer
        )
        self.self_play = SelfPlay(run, self.ranks, backend, scorer, self.batches, sampling.stop_token_ids)
        self.held_out = HeldOutPlay(run, trainer, self.ranks, sampling, pad, scorer)
        self.benchmarks = PolicyBenchmarks(run, trainer, self.ranks)
        self._pairs: PairDataset | None = None
        self._layout_settled = self._first_step_due = False

    def epoch(self, epoch: int, model: Any, train: Train) -> None:
        """Runs one epoch of the run: an iteration's first makes its pairs, its last closes it.

        Args:
            epoch: Of the run, from 0.
            model: The policy as the trainer wraps it.
            train: See `Train`.
        """
        if self.outcome.ended:  # by the iteration that a resume has just closed
            self.trainer.control.should_training_stop = True
            return
        entry = self.run.plan.of_epoch(epoch)
        with self.ranks:
            if self._pairs is None or epoch == self.run.plan.first_epoch(entry):
                self.begin(entry, model)
            train(self.loader(self._pairs, entry, epoch), entry)
            self.ranks.ferry.clear()  # the checkpoint that the host has gone on from
            if self.ended(entry):
                self.end(entry)

    def begin(self, entry: IterationPlan, model: Any) -> None:
        """Has an iteration's pairs made, or reads those that an earlier start made."""
        fresh = self.trainer.state.global_step == entry.first_step
        self._settle_layout(model)
        self._pairs, figures = self.self_play.begin(entry, model, fresh)
        if self.run.images is not None:
            self.ranks.on_main(lambda: keep_thumbnails(self.run))
        if fresh:
            start: dict[str, float] = {}
            if entry.iteration == 0:  # of the model that the run starts from
                for part in (self.held_out, self.benchmarks, self.outcome):
                    start |= part.before()
            self.progress.begin(entry, figures)
            known = self.progress.record.figures
            self.trainer.log({name: value for name, value in known.items() if value is not None})
            known.update(start)
            self._first_step_due = True
            self.trainer.schedule.at(entry.first_step)
            if entry.iteration > 0 and self.run.settings.restart_optimizer:
                restart_optimizer(self.trainer.optimizer, self.trainer.optimizer_start)
        self.progress.write()

    def losses(self, model: Any, batch: dict[str, Tensor]) -> Tensor:
        """Returns the sum of the losses of a micro-batch's pairs, after a look at whether they are sound."""
        settings, entry, step = self.run.settings, self.progress.record.plan, self.trainer.state.global_step
        found = pair_losses(
            model,
            batch,
            beta=entry.beta,
            loss_type=settings.loss,
            sft_weight=settings.sft_weight,
            length_normalized=settings.length_normalized,
            in_head=self.collator.in_head,
        )
        act_on(check_loss(found.spin.losses, found.logps, step=step, iteration=entry.iteration), main=True)
        if self._first_step_due:
            self._first_step_due = False
            real = found.weight > 0
            findings = check_step_zero(
                found.spin.losses.detach()[real],
                found.drift.view(2, -1).mean(0)[real],
                expected=LOSS_AT_START[settings.loss],
                beta=entry.beta,
                iteration=entry.iteration,
            )
            act_on(findings, main=True)
        chosen, rejected = found.logps.chunk(2)
        self.progress.metrics.add(step, found.spin, chosen, rejected, found.weight)
        return (found.losses * found.weight).sum()

    def ended(self, entry: IterationPlan) -> bool:
        """Whether an iteration has taken its last step."""
        return self.trainer.state.global_step == entry.first_step + entry.steps

    def end(self, entry: IterationPlan) -> None:
        """Closes an iteration after its last step; the same again where a run was stopped in the midst of it."""
        trainer, progress = self.trainer, self.progress
        trainer.log(progress.end())
        record = progress.record
        self.outcome.evaluate(entry)
        self.refuse_nonfinite_weights()
        if self.run.settings.save_iterations:
            save_whole(trainer, self.run.directory.model(entry.iteration))
        self._settle_layout(trainer.model_wrapped)  # an iteration that a resume closes has not begun in this start
        record.figures.update(self.held_out.after(entry))
        record.figures.update(self.benchmarks.after(entry))
        progress.write()
        self.ranks.say(record.line())
        self.outcome.after(entry)
        if self.ranks.main and not self.outcome.ended:
            show_table(self.run.directory, self.run.plan, entry)
        self.self_play.end(entry)
        self._pairs = None

    # -- what it is made of --------------------------------------------------------------------------------------------

    def batches(self, pairs: Any, entry: IterationPlan) -> MicroBatches:
        """Returns the micro-batches of an iteration, for the opponent's pass and every epoch alike."""
        padded = self.collator.layout == "padded" and isinstance(pairs, PairDataset)
        return MicroBatches(
            len(pairs),
            micro_batch=self.trainer.args.per_device_train_batch_size,
            step=self.run.plan.global_batch,
            seed=self.run.seed,
            first_epoch=self.run.plan.first_epoch(entry),
            shuffle=self.run.shuffle,
            lengths=pairs.padded_lengths() if padded else None,
        )

    def loader(self, pairs: Any, entry: IterationPlan, epoch: int) -> DataLoader:
        """Returns a loader of this rank's micro-batches of an epoch; see `pair_loader`."""
        batches, arguments = self.batches(pairs, entry), self.trainer.args
        how = {"ranks": self.ranks.count, "rank": self.ranks.rank, "epoch": epoch}
        return pair_loader(pairs, batches, self.collator, arguments, **how)

    def refuse_nonfinite_weights(self) -> None:
        """Stops a run whose weights are no numbers, before they are saved."""
        bad = nonfinite_weights(bare(self.trainer.model, self.ranks.accelerator))
        act_on(check_weights(bad, step=self.trainer.state.global_step), main=True)

    def _settle_layout(self, model: Any) -> None:
        if self._layout_settled:
            return
        self._layout_settled = True
        half = self.trainer.args.bf16 or self.trainer.args.fp16
        images = self.run.images
        refuse_noise(model, self.run.prompts, self.collator.pad_token_id, self.ranks, half=half, images=images)
        line = settle_layout(
            self.collator,
            model,
            self.run.prompts,
            self.ranks.accelerator,
            sample_packing=self.run.sample_packing,
            longest=self.run.sequence_len,
            images=images,
        )
        LOG.info(line)
