"""The data plane from ten thousand rows to a million: time for each row, and memory above the files' own pages.

The real loop runs (`SelfPlay`), with answers and log-probs out of the air: prompts are attached, answers collected, pairs
assembled, written, loaded as a second start does, and read in an epoch's shuffled order. Called by `run.py`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import workload

PART = 100  # tokens of a prompt, of a human answer and of an opponent's on average
PHASES = ("attach", "begin", "load", "shuffle")


def measure(folder: Path, *, sizes: tuple[int, ...]) -> list[dict[str, Any]]:
    """Returns the rows of the table, one for each phase and one for memory.

    Args:
        folder: Of `workload.prepare`.
        sizes: Numbers of pairs, the smallest first.
    """
    found = {}
    for size in sizes:
        result = folder / f"data-plane-{size}.json"
        found[size] = workload.measured([__file__, str(folder), str(size)], result)
    first, last = sizes[0], sizes[-1]
    about = f"pairs of {3 * PART} tokens, {first} and {last} of them"
    rows = []
    for phase in PHASES:
        small, large = (1e6 * found[size]["seconds"][phase] / size for size in (first, last))
        rows.append(
            {
                "figure": f"data plane, us a pair, {LABELS[phase]}",
                "workload": about,
                "value": large,
                "against": "itself with the fewer",
                "other": small,
                "ratio": large / small,
                "target": "about 1",
            }
        )
    small, large = (found[size]["anonymous_bytes"] / 2**30 for size in (first, last))
    rows.append(
        {
            "figure": "data plane, GiB above the files' pages",
            "workload": about,
            "value": large,
            "against": "itself with the fewer",
            "other": small,
            "ratio": large / small,
            "target": "<= 1 GiB",
        }
    )
    return rows


LABELS = {
    "attach": "prompts from SFT rows",
    "begin": "answers to pairs.parquet",
    "load": "pairs.parquet at a second start",
    "shuffle": "an epoch in shuffled order",
}


@contextmanager
def anonymous_peak() -> Iterator[dict[str, int]]:
    """Watches the process's anonymous memory: what is resident without being a file's page."""
    found = {"peak": _anonymous()}
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(0.02):
            found["peak"] = max(found["peak"], _anonymous())

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        stop.set()
        thread.join()


def _anonymous() -> int:
    from probe import resident

    return resident("RssAnon")


def sft_rows(path: Path, count: int) -> Any:
    """Returns a prepared SFT dataset of so many rows of prompt and answer, mapped from a file that it writes."""
    import numpy as np
    import pyarrow as pa
    from datasets import Dataset

    draw = np.random.default_rng(0)
    ids_of = pa.list_(pa.int32())
    schema = pa.schema([("input_ids", ids_of), ("labels", ids_of)])
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, schema) as file:
        for start in range(0, count, 10_000):
            lengths = draw.integers(PART // 2, PART * 3 // 2, (min(10_000, count - start), 2))
            offsets = np.concatenate([[0], lengths.sum(1).cumsum()]).astype(np.int32)
            ids = draw.integers(300, 40_000, offsets[-1]).astype(np.int32)
            place = np.arange(len(ids)) - np.repeat(offsets[:-1], np.diff(offsets))
            labels = np.where(place < np.repeat(lengths[:, 0], np.diff(offsets)), -100, ids).astype(np.int32)
            columns = [pa.ListArray.from_arrays(pa.array(offsets), pa.array(values)) for values in (ids, labels)]
            file.write_batch(pa.record_batch(columns, schema=schema))
    return Dataset.from_file(str(path))


class OutOfTheAir:
    """A backend and a scorer without a model."""

    def answer(self, model: Any, chunks: Any, keep: Any, iteration: int = 0) -> dict[str, float]:
        import numpy as np

        from axolotl_spin.generation.backend import Completion

        for chunk in chunks:
            draw = np.random.default_rng(chunk.index)
            lengths = draw.integers(PART // 2, PART * 3 // 2, len(chunk.rows))
            keep(chunk, [Completion(draw.integers(300, 40_000, length).tolist(), "stop") for length in lengths])
        return {}

    def logps(self, model: Any, pairs: Any, batches: Any, advance: Any) -> Any:
        import torch

        return torch.full((len(pairs), 2), -100.0, dtype=torch.float64)


def exercise(folder: Path, count: int) -> dict[str, Any]:
    """Runs all phases and returns seconds and memory."""

    import torch
    from accelerate import Accelerator
    from transformers import AutoTokenizer

    from axolotl_spin.data.endings import Endings
    from axolotl_spin.data.prompts import prompt_dataset
    from axolotl_spin.disk.directory import RunDirectory
    from axolotl_spin.game.self_play import SelfPlay
    from axolotl_spin.ranks.main import Ranks
    from axolotl_spin.run.identity import Identity, _content_hash
    from axolotl_spin.run.plan import make_plan
    from axolotl_spin.run.prepare import Launch, SpinRun
    from axolotl_spin.settings.spin import SpinConfig
    from axolotl_spin.training.batches import MicroBatches, StepBatches

    work = folder / "data-plane"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    rows = sft_rows(work / "rows.arrow", count)
    tokenizer = AutoTokenizer.from_pretrained(folder / "smollm2")
    accelerator, air = Accelerator(cpu=True), OutOfTheAir()
    model = torch.nn.Linear(1, 1)
    seconds: dict[str, float] = {}

    @contextmanager
    def timed(phase: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        seconds[phase] = time.perf_counter() - started

    def composed(pairs: Any, entry: Any) -> MicroBatches:
        return MicroBatches(len(pairs), micro_batch=8, step=64, seed=7, first_epoch=entry.iteration)

    baseline = _anonymous()
    with anonymous_peak() as anonymous:
        with timed("attach"):
            prompts = prompt_dataset(rows, turns="last")
            content = _content_hash(prompts)
        settings = SpinConfig(iterations=1, active=True)
        plan = make_plan(
            len(prompts), global_batch=64, num_epochs=1, history=0, betas=[0.1], learning_rates=[1e-6]
        )  # fmt: skip
        run = SpinRun(
            settings=settings, prompts=prompts, plan=plan, directory=RunDirectory(work / "out"),
            identity=Identity({"data": content}, {}, [entry.to_json() for entry in plan.iterations]),
            tokenizer=tokenizer, sequence_len=2048, seed=7, shuffle=True, stops=(2,),
            endings=Endings(count, 0, 0, None, count, 0),
            launch=Launch(1, None), sample_packing=None,
        )  # fmt: skip
        play: Any = SelfPlay(run, Ranks(accelerator), air, air, composed, run.stops)  # type: ignore[arg-type]
        with timed("begin"):
            play.begin(plan.iterations[0], model)
        with timed("load"):
            pairs, _ = play.begin(plan.iterations[0], model)
        with timed("shuffle"):
            batches = StepBatches(composed(pairs, plan.iterations[0]), ranks=1, rank=0, epoch=0)
            tokens = sum(len(pairs[index]["rejected_ids"]) for batch in batches for index, _ in batch)
    assert tokens == pairs.lengths("rejected_ids").sum()
    shutil.rmtree(work)
    return {"seconds": seconds, "anonymous_bytes": anonymous["peak"] - baseline}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("count", type=int)
    given = parser.parse_args()
    Path(os.environ["BENCH_RESULT"]).write_text(json.dumps(exercise(given.folder, given.count)))
