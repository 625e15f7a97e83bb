"""Benchmarks of the policy while it is trained: of the start model, and of what each iteration results in.

Nothing here touches training: the policy is frozen, global random state and environment are put back. What an earlier start
has measured with the same weights is read from disk.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from axolotl_spin.evals.results import collect, figures, holds, read_evals, same_model, summary, write_evals
from axolotl_spin.monitor.benchmarks import EVAL, EVAL_START
from axolotl_spin.ranks.main import Ranks
from axolotl_spin.run.plan import IterationPlan
from axolotl_spin.run.prepare import SpinRun
from axolotl_spin.training.policy import weights_digest


class PolicyBenchmarks:
    """Runs the `spin.eval_tasks` on the policy, over all ranks; does nothing where there are none.

    Args:
        run: Settings, benchmarks and directory.
        trainer: The host's trainer: wrapped model, logging.
        ranks: All of them.
    """

    def __init__(self, run: SpinRun, trainer: Any, ranks: Ranks):
        self.run, self.trainer, self.ranks = run, trainer, ranks
        if run.benchmarks is not None:
            from axolotl_spin.evals.harness import refuse_tokenizer

            refuse_tokenizer(run.tokenizer)

    def before(self) -> dict[str, float]:
        """Measures the model that the run starts from, and logs the figures under their usual names.

        Returns:
            The same figures as `spin/eval_start/*`; none without benchmarks.
        """
        if self.run.benchmarks is None:
            return {}
        found = self._measure("start", self.run.directory.start_evals, self.run.identity.before(0))
        return _of_the_start(found)

    def after(self, entry: IterationPlan) -> dict[str, float]:
        """Measures the model that an iteration resulted in, writes `evals.json` and logs the figures.

        Args:
            entry: The iteration.

        Returns:
            The figures under their public names, with those that `axolotl spin eval` has put beside them, of the start
            model too in iteration 0; without benchmarks those alone.
        """
        directory, identity = self.run.directory, self.run.identity
        path, mark = directory.evals(entry.iteration), identity.through(entry.iteration)
        if self.run.benchmarks is not None:
            found = self._measure(f"iteration {entry.iteration}", path, mark)
        else:
            found = self._noted(path, mark)
        if entry.iteration == 0:
            found |= _of_the_start(self._noted(directory.start_evals, identity.before(0)))
        return found

    def _noted(self, path: Path, mark: str) -> dict[str, float]:
        """Returns the figures that are on disk of a model of this run."""
        known = self.ranks.on_main(lambda: read_evals(path))
        return figures(known) if known is not None and same_model(known, {"run": mark}) else {}

    def _measure(self, name: str, path: Path, mark: str) -> dict[str, float]:
        started = time.perf_counter()
        benchmarks, model, settings = self.run.benchmarks, self.trainer.model_wrapped, self.run.settings
        like = {
            "run": mark,
            "weights": weights_digest(model, self.ranks.accelerator),
            "limit": benchmarks.limit,
            "chat_template": benchmarks.chat_template,
        }
        known = self.ranks.on_main(lambda: self._known(path, like))
        if known is None:
            from axolotl_spin.evals.harness import ask_policy

            answered = ask_policy(
                model,
                self.run.tokenizer,
                benchmarks,
                self.ranks,
                answers=settings.generation.batch_size,
                sequences=self.trainer.args.per_device_eval_batch_size,
                gather=settings.generation.gather_weights,
                name=name,
            )
            known = self.ranks.on_main(lambda: self._keep(path, answered, like))
            seconds = time.perf_counter() - started
            found = {**figures(known), "spin/eval_seconds": seconds}
            self.ranks.say(f"{name}: benchmarks in {seconds:.1f} s: {summary(known)}")
        else:
            found = figures(known)
            self.ranks.say(f"{name}: benchmarks as in {path}: {summary(known)}")
        self.trainer.log(dict(found))  # which adds keys of the host's
        return found

    def _known(self, path: Path, like: dict[str, Any]) -> dict[str, Any] | None:
        """Returns what is on disk of this very model, where it is all that is asked for. Call it on one rank."""
        known = read_evals(path)
        wanted = self.run.benchmarks.wanted()
        return known if known is not None and same_model(known, like) and holds(known, wanted) else None

    def _keep(self, path: Path, answered: dict[str, Any] | None, like: dict[str, Any]) -> dict[str, Any]:
        assert answered is not None
        return write_evals(path, collect(answered, **like))


def _of_the_start(found: dict[str, float]) -> dict[str, float]:
    return {name.replace(EVAL, EVAL_START): value for name, value in found.items() if name.startswith(EVAL)}
