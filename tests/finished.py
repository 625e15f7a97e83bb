"""Makes the folder of a run as our own code writes it, without training: for pages of many pairs, or of odd texts."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from axolotl_spin.data.pairs import BATCH_ROWS, SCHEMA, write_pairs
from axolotl_spin.disk.atomic import write_json
from axolotl_spin.disk.directory import RunDirectory
from axolotl_spin.monitor.log import restart_log
from axolotl_spin.run.identity import Identity
from axolotl_spin.run.plan import Plan, make_plan

WORDS = np.array([f"word{index}" for index in range(500)])


def make(
    output_dir: Path,
    prompts: int = 40,
    iterations: int = 2,
    words: int = 6,
    odd: Sequence[str] = (),
    begun: int | None = None,
    seed: int = 0,
    **fixed: Any,
) -> Plan:
    """Writes plan, pairs, metrics and log.

    Args:
        output_dir: The run's.
        prompts: Prompts; an iteration after the first has the pairs of the one before as well.
        iterations: Of the plan.
        words: Mean length of the opponent's answers in iteration 0, in words of a token each; it falls by two.
        odd: Texts of the first prompts' answers, in place of random words; unlikely ones, so that a sample has them.
        begun: Iterations that have pairs; all by default.
        seed: Of everything random.
        fixed: What identifies the run, beside its seed.
    """
    directory, generator = RunDirectory(output_dir), np.random.default_rng(seed)
    rates = [1e-5] * iterations
    plan = make_plan(
        prompts,
        global_batch=max(1, prompts // 20),
        num_epochs=1,
        history=1,
        betas=[0.1] * iterations,
        learning_rates=rates,
    )
    entries = json.loads(json.dumps([entry.to_json() for entry in plan.iterations]))
    identity = Identity({"base_model": "a/model", "seed": seed, **fixed}, {}, entries)
    complete = begun in (None, iterations)
    write_json(
        directory.plan,
        {**identity.to_json(), **plan.to_json(), "completed_steps": plan.total_steps if complete else None},
    )
    human = _answers(generator, prompts, 5)
    asked = _answers(generator, prompts, 8)
    before: dict[str, Any] | None = None
    rows: list[dict[str, Any]] = []
    for entry in plan.iterations[:begun]:
        own = _answers(generator, prompts, max(2, words - 2 * entry.iteration), odd)
        logps = [-2.0 * human["length"], -(1.0 + generator.random(prompts)) * own["length"]]
        logps[1][: len(odd)] -= 1000.0
        new = {"own": own, "logps": logps, "iteration": entry.iteration}
        parts = [new] if before is None else [new, before]
        write_pairs(directory.pairs(entry.iteration), _batches(asked, human, parts), identity.before(entry.iteration))
        before = new
        _play(directory.heldout(entry.iteration), f"answer of {entry.iteration}", entry.iteration + 1)
        for step in range(entry.first_step + 1, entry.first_step + entry.steps + 1):
            done = (step - entry.first_step) / entry.steps
            rows.append(_row(done, 1e-5, step, plan.total_steps))
        figures = {
            "spin/iteration": entry.iteration, "spin/beta": entry.beta, "loss_first": math.log(2), "loss_last": 0.35,
            "rewards/accuracies": 0.9, "rewards/margins": 1.1, "rewards/chosen": 0.1, "rewards/rejected": -1.0,
            "spin/rejected_length": float(own["length"].mean()), "spin/chosen_length": float(human["length"].mean()),
            "spin/truncated": 0.1, "spin/empty": 0.0, "spin/identical": 0.0, "eval_loss": 2.0 - 0.1 * entry.iteration,
            "spin/heldout_auc": 0.7, "spin/heldout_margin": 0.4, "spin/heldout_length": 7.0, "spin/heldout_distinct_2": 0.6,
            "spin/heldout_seconds": 12.0, "eval_loss_stderr": 0.02, "spin/heldout_auc_stderr": 0.04,
            "spin/heldout_wins": 0.6, "spin/heldout_length_wins": 0.55,
            "spin/generation_seconds": 30.0, "spin/scoring_seconds": 5.0, "spin/training_seconds": 60.0,
        }  # fmt: skip
        if entry.iteration == 0:
            figures |= {"spin/start_eval_loss": 2.2, "spin/start_eval_loss_stderr": 0.03, "spin/heldout_start_auc": 0.2}
        rows.append(
            {"eval_loss": figures["eval_loss"], "step": entry.first_step + entry.steps, "epoch": entry.iteration + 1}
        )
        write_json(directory.metrics(entry.iteration), figures)
    restart_log(directory.log, rows)
    _play(directory.heldout(None), "answer of the start", 0)
    lines = [
        "best by `eval_loss` (lower is better): iteration 0, 2.0000 ± 0.0200",
        "iteration 1 is ahead, which is noise",
    ]
    write_json(directory.best, {"select": "eval_loss", "best": 0, "kept": 0, "says": lines})
    return plan


def _play(path: Path, own: str, number: int) -> None:
    """Writes a play on twelve held-out prompts, of which the human answers to the first half become likelier each time."""
    rows = [
        {"prompt": f"<b>held-out {i}", "human": f"human {i}", "own": own, "prompt_ids": [i], "human_ids": [1, 2],
         "own_ids": [1] * (number + 1), "human_logp": -9.0 + number * (1 if i < 6 else -1) * (i + 1) / 4}
        for i in range(12)
    ]  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path, write_page_checksum=True)


def _row(done: float, rate: float, step: int, steps: int) -> dict[str, Any]:
    """Returns what is logged when so much of an iteration is done."""
    return {
        "loss": math.log(2) * (1 - 0.5 * done),
        "learning_rate": rate * (1 - done),
        "rewards/chosen": 0.1 * done,
        "rewards/rejected": -done,
        "rewards/margins": 1.1 * done,
        "rewards/accuracies": 0.5 + 0.4 * done,
        "logps/chosen": -10.0,
        "logps/rejected": -12.0 - done,
        "epoch": step / steps,
        "step": step,
    }


def _answers(generator: np.random.Generator, count: int, mean: int, odd: Sequence[str] = ()) -> dict[str, Any]:
    length = generator.integers(1, 2 * mean, size=count)
    ids = generator.integers(0, len(WORDS), size=int(length.sum()))
    ends = np.cumsum(length)
    words = WORDS[ids]
    texts = [" ".join(words[end - size : end]) for end, size in zip(ends, length, strict=True)]
    texts[: len(odd)] = odd
    return {"length": length, "ids": ids.astype(np.int32), "ends": ends, "texts": texts}


def _batches(asked: dict, human: dict, parts: list[dict[str, Any]]) -> Iterator[pa.RecordBatch]:
    count = len(human["length"])

    def ids(answers: dict, start: int, end: int) -> pa.Array:
        offsets = np.concatenate([[0], answers["ends"]])[start : end + 1]
        values = answers["ids"][offsets[0] : offsets[-1]]
        return pa.ListArray.from_arrays(pa.array(offsets - offsets[0], pa.int32()), pa.array(values))

    for part in parts:
        for start in range(0, count, BATCH_ROWS):
            end = min(start + BATCH_ROWS, count)
            own = part["own"]
            columns = {
                "prompt_ids": ids(asked, start, end),
                "chosen_ids": ids(human, start, end),
                "rejected_ids": ids(own, start, end),
                "prompt": asked["texts"][start:end],
                "chosen": human["texts"][start:end],
                "rejected": own["texts"][start:end],
                "finish_reason": np.where(own["length"][start:end] >= own["length"].max(), "length", "stop"),
                "generated_in": np.full(end - start, part["iteration"], dtype=np.int32),
                "opponent_chosen_logp": part["logps"][0][start:end],
                "opponent_rejected_logp": part["logps"][1][start:end],
                "row": np.arange(start, end),
            }
            yield pa.record_batch([pa.array(columns[field.name]).cast(field.type) for field in SCHEMA], schema=SCHEMA)
