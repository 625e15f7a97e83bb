"""Whether an iteration's steps reach the weights, measured once at its full learning rate."""

from __future__ import annotations

from typing import Any

from axolotl_spin.game.health import Finding, act_on
from axolotl_spin.monitor.iteration import Progress
from axolotl_spin.ranks.main import Ranks
from axolotl_spin.training.updates import UpdateSample

NAME = "spin/updated_weights"

# A step that is less than half the spacing of bf16 around a weight leaves it where it is, at every step anew. SmolLM2-135M
# in bf16 with AdamW: 0.3% of the weights moved at 5e-7, 1% at 5e-6, 4% at 2e-5, where fp32 weights with a gradient all do.
# Below a tenth, what is trained is the few weights that are near zero
_FEWEST = 0.1


WAYS_OUT = (
    "train with `deepspeed` or an `adapter`, which keep fp32 weights (`fsdp_config` does not: its shards have the type "
    "that the weights are loaded in), or with `bf16: false`; or take an optimizer that keeps what rounding takes "
    "(`optimi_adamw`, `flash_adamw`) or rounds by chance (`adamw_torch_8bit` with `optim_args: "
    "bf16_stochastic_round=True`); or raise `learning_rate`"
)


class UpdateWatch:
    """Measures the share of the trained weights that a step changes: of each iteration's first step after its warmup.

    Args:
        trainer: The host's.
        ranks: All of them.
        progress: Of the running iteration, which keeps the figure.
    """

    def __init__(self, trainer: Any, ranks: Ranks, progress: Progress):
        self._trainer, self._ranks, self._progress = trainer, ranks, progress
        self._sample: UpdateSample | None = None

    def before_step(self) -> None:
        """Looks at the weights if the step that begins is the one to be measured."""
        record, step = self._progress.record, self._trainer.state.global_step
        entry = record.plan
        due = entry.first_step + min(entry.warmup_steps, entry.steps - 1)
        moving = any(float(group["lr"]) > 0 for group in self._trainer.optimizer.param_groups)
        if step >= due and moving and NAME not in record.figures:
            self._sample = UpdateSample(self._trainer.optimizer)

    def after_step(self) -> None:
        """Logs the share, and warns where rounding leaves little of the step; every rank must call."""
        sample, self._sample = self._sample, None
        if sample is None or self._trainer.accelerator.optimizer_step_was_skipped:
            return
        counts = self._ranks.sum(sample.counts().to(self._ranks.device))
        changed, count = counts.sum(0).tolist()
        if not count:  # all of them are on a disk
            return
        self._progress.add(NAME, changed / count)
        changed, half = counts[0].tolist()
        if half and not sample.keeps_remainders:
            entry = self._progress.record.plan
            findings = check_updates(changed / half, half / count, rate=entry.learning_rate, iteration=entry.iteration)
            act_on(findings, self._ranks.main)


def check_updates(share: float, half: float, *, rate: float, iteration: int) -> list[Finding]:
    """Looks for steps that are lost to rounding.

    Args:
        share: Of the trained weights in half precision, those that a step changed.
        half: Of the trained weights, those in half precision (the host keeps embeddings in fp32, for instance).
        rate: The learning rate.
        iteration: The running iteration.
    """
    if share >= _FEWEST:
        return []
    return [
        Finding(
            f"iteration {iteration}: a step at the learning rate {rate:g} changed {share:.2%} of the weights trained "
            f"in half precision ({half:.0%} of all), where one smaller than half the spacing of the numbers is lost: "
            f"{WAYS_OUT}",
            fatal=False,
        )
    ]
