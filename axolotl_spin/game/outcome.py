"""What comes of an iteration: its held-out rows are kept, it is judged beside those before, and the run may end with it."""

from __future__ import annotations

from typing import Any

import numpy as np

from axolotl_spin.monitor.iteration import Progress
from axolotl_spin.ranks.main import Ranks
from axolotl_spin.run.keeping import alone, keep_alone
from axolotl_spin.run.plan import IterationPlan
from axolotl_spin.run.prepare import SpinRun
from axolotl_spin.run.saving import save_whole
from axolotl_spin.run.selected import (
    START_LOSS,
    START_LOSS_STDERR,
    Known,
    has_eval_rows,
    mark_of,
    stand,
    write_best,
    write_eval_rows,
)
from axolotl_spin.run.selection import Standing
from axolotl_spin.training.policy import frozen


class Outcome:
    """Judges a run's iterations, over all ranks.

    Args:
        run: Settings, plan, and the figure that selects.
        trainer: The host's: evaluation, state, control.
        ranks: All of them.
        progress: Of the running iteration.

    Attributes:
        ended: Whether `spin.patience` has ended the run.
    """

    def __init__(self, run: SpinRun, trainer: Any, ranks: Ranks, progress: Progress):
        self.run, self.trainer, self.ranks, self.progress = run, trainer, ranks, progress
        self.ended = False
        self._start: dict[str, float] = {}
        self._known: Known = {}

    def before(self) -> dict[str, float]:
        """Evaluates the model that the run starts from, unless the host has (`eval_on_start`).

        Returns:
            Its `eval_loss` and standard error under names of their own; nothing without held-out data.
        """
        if self.trainer.eval_dataset is not None and not self._start:
            with frozen(self.trainer.model_wrapped):
                self.trainer.evaluate()
        return self._start

    def evaluated(self, loss: float, stderr: float | None, rows: dict[str, np.ndarray]) -> None:
        """Keeps what an evaluation gave: of the running iteration, or before the first one of the start model.

        Args:
            loss, stderr, rows: See `TokenLoss.evaluated`.
        """
        iteration = self.progress.record.plan.iteration if self.progress.begun else None
        if iteration is None:
            self._start = {START_LOSS: loss} | ({} if stderr is None else {START_LOSS_STDERR: stderr})
        if self.ranks.main and len(rows["key"]):
            path, mark = self.run.directory.eval_rows(iteration), mark_of(self.run.identity, iteration)
            write_eval_rows(path, rows, mark, self.trainer.state.global_step)

    def evaluate(self, entry: IterationPlan) -> None:
        """Evaluates what an iteration resulted in, unless an evaluation at its last step has left its rows."""
        if self.trainer.eval_dataset is None:
            return
        step = self.trainer.state.global_step
        path, mark = self.run.directory.eval_rows(entry.iteration), mark_of(self.run.identity, entry.iteration)
        known = self.progress.record.evaluated_at == step
        if not (known and self.ranks.on_main(lambda: has_eval_rows(path, mark, step))):
            self.trainer.evaluate()

    def after(self, entry: IterationPlan) -> None:
        """Judges an iteration whose figures are on disk, and ends the run where `spin.patience` has run out.

        The same figures give the same standing, so an iteration's end may be run again.
        """
        settings, directory = self.run.settings, self.run.directory
        standing: Standing | None = self.ranks.on_main(lambda: stand(self.run, entry.iteration, self._known))
        if standing is None:
            return
        one = settings.keep == "best" and not settings.save_iterations
        if one and standing.best == entry.iteration:
            save_whole(self.trainer, directory.model(entry.iteration))

        def write() -> None:
            if one:
                keep_alone(self.run, standing)
            write_best(self.run, standing, alone=standing.best if one else alone(self.run))

        self.ranks.on_main(write)
        for line in standing.lines():
            self.ranks.say(line)
        if standing.ended:
            self.ended = True
            self.trainer.control.should_training_stop = True
            self.ranks.say(f"the run ends here, complete: {standing.why_ended}")
