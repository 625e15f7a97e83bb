"""How long a run takes, by throughput that the user gives or that a run in the same folder has measured; never a guess."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from axolotl_spin.disk.atomic import DamagedFileError, read_json
from axolotl_spin.disk.directory import RunDirectory
from axolotl_spin.monitor.tables import read_metrics
from axolotl_spin.run.plan import Plan, read_iterations


@dataclass(frozen=True)
class Rate:
    """Tokens per second over all ranks.

    Attributes:
        value: None where it is neither given nor measured.
        source: Where it comes from.
    """

    value: float | None
    source: str


@dataclass(frozen=True)
class Measured:
    """What a run in the same folder has measured, in its latest iteration that has the figure.

    Attributes:
        generation: Drawn tokens per second.
        scoring: Tokens of pairs (prompt and both answers) per second.
        training: Tokens of pairs per second.
        answer_tokens: Mean tokens of an answer.
    """

    generation: Rate
    scoring: Rate
    training: Rate
    answer_tokens: float | None


def measure(directory: RunDirectory, plan: Plan) -> Measured:
    """Reads `metrics.json` and `pairs.parquet` of the run in a folder, finished or not.

    Args:
        directory: Its files.
        plan: For what the folder's own plan does not say.
    """
    passes, ranks = _passes(directory, plan), _ranks(directory)
    rates = {"generation": Rate(None, "neither given nor measured")} | {
        kind: Rate(None, "neither given nor measured") for kind in ("scoring", "training")
    }
    answer_tokens = None
    for entry in plan.iterations:
        [found] = read_metrics([directory.metrics(entry.iteration)]) or [{}]
        where = f"measured in iteration {entry.iteration} of {directory.root.parent}{ranks}"
        answer_tokens = found.get("spin/rejected_length", answer_tokens)
        if speed := found.get("spin/generation_tokens_per_second"):
            rates["generation"] = Rate(speed, where)
        tokens = _tokens(directory, entry.iteration)
        for kind, times in (("scoring", 1.0), ("training", passes[entry.iteration])):
            if tokens and (seconds := found.get(f"spin/{kind}_seconds")):
                rates[kind] = Rate(tokens * times / seconds, where)
    return Measured(**rates, answer_tokens=answer_tokens)


def _passes(directory: RunDirectory, plan: Plan) -> dict[int, float]:
    """Returns how often each iteration goes over its pairs: by the plan in the folder, which was another one perhaps."""
    entries = list(plan.iterations)
    with suppress(FileNotFoundError, ValueError, TypeError):  # what is wrong with the folder is told elsewhere
        entries += read_iterations(read_json(directory.plan))
    return {entry.iteration: entry.steps / max(1, entry.steps_per_epoch) for entry in entries}


def _ranks(directory: RunDirectory) -> str:
    """Says on how many ranks the run in the folder was started; nothing where that is not known."""
    try:
        counts = sorted({int(start["ranks"]) for start in read_json(directory.about)["starts"]})
    except (FileNotFoundError, DamagedFileError, KeyError, TypeError, ValueError):
        return ""
    return f" on {' or '.join(map(str, counts))} rank(s)" if counts else ""


def _tokens(directory: RunDirectory, iteration: int) -> int | None:
    """Returns the tokens of an iteration's pairs: values of the id columns in the file's footer."""
    try:
        with pq.ParquetFile(directory.pairs(iteration)) as file:
            groups = [file.metadata.row_group(index) for index in range(file.metadata.num_row_groups)]
    except (OSError, pa.ArrowException):
        return None
    columns = [group.column(index) for group in groups for index in range(group.num_columns)]
    return sum(column.num_values for column in columns if column.path_in_schema.split(".")[0].endswith("_ids"))


@dataclass(frozen=True)
class Tokens:
    """Tokens of one iteration, from the least to the most that its answers may have.

    Attributes:
        drawn: That the opponent draws.
        pairs: Of all its pairs, each prompt once.
    """

    drawn: tuple[float, float]
    pairs: tuple[float, float]


def estimate_time(plan: Plan, tokens: list[Tokens], measured: Measured) -> dict[str, Any]:
    """Estimates seconds, each from the least to the most; None where a rate is missing.

    Args:
        plan: The run's.
        tokens: Of each iteration.
        measured: The rates to reckon with.
    """

    def seconds(amount: tuple[float, float], rate: Rate) -> list[float] | None:
        if amount[1] == 0:
            return [0.0, 0.0]
        return None if not rate.value else [bound / rate.value for bound in amount]

    iterations = []
    for entry, of_iteration in zip(plan.iterations, tokens, strict=True):
        passes = entry.steps / entry.steps_per_epoch
        low, high = of_iteration.pairs
        iterations.append(
            {
                "iteration": entry.iteration,
                "generation_seconds": seconds(of_iteration.drawn, measured.generation),
                "scoring_seconds": seconds(of_iteration.pairs, measured.scoring),
                "training_seconds": seconds((low * passes, high * passes), measured.training),
            }
        )
    phases = ("generation", "scoring", "training")
    parts = [row[f"{phase}_seconds"] for row in iterations for phase in phases]
    total = None if None in parts else [sum(part[bound] for part in parts if part) for bound in (0, 1)]  # type: ignore[index]
    rates = {phase: getattr(measured, phase) for phase in phases}
    return {
        "rates": {phase: {"tokens_per_second": rate.value, "source": rate.source} for phase, rate in rates.items()},
        "iterations": iterations,
        "total_seconds": total,
    }
