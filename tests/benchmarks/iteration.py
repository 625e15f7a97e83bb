"""A whole iteration by the host, against the sum of its parts measured alone, on the same prompts and answers.

The whole: from the first answer to the end of the last step, with files, checks and logs; the seconds that it notes of its
phases stand beside it, and the rest, which belongs to none. The parts, with nothing around them: the backend answers the
prompts, the scorer scores the pairs, and training steps (forward, backward, clipping, optimizer) run on batches that are
ready. Each contestant is a process of its own, in turn.

Called by `run.py`; with `--parts` it measures the parts.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import workload

BATCH = 8
PHASES = ("generation", "scoring", "training")


def measure(folder: Path, model: str, *, pairs: int, most: int, repeats: int) -> list[dict[str, Any]]:
    """Returns the row of the table.

    Args:
        folder: Of `workload.prepare`.
        model: One of `workload.MODELS`.
        pairs: Prompts that are answered, and trained on in steps of `BATCH`.
        most: Most tokens in an answer.
        repeats: Of each contestant; medians count.
    """
    work = folder / "iteration" / model
    shutil.rmtree(work, ignore_errors=True)
    generation = {"max_new_tokens": most, "batch_size": BATCH}
    spin = {"iterations": 1, "save_iterations": False, "max_prompts": pairs, "generation": generation}
    config = workload.settings(folder, model, spin=spin, output_dir=str(work / "out"))
    file = work / "out" / "spin" / "iteration-0" / "pairs.parquet"
    wholes, phases, parts = [], [], []
    for _ in range(repeats):
        shutil.rmtree(work / "out", ignore_errors=True)
        wholes.append(workload.run(work, config)["iteration_seconds"])
        phases.append(phases_of(file.with_name("metrics.json"), wholes[-1]))
        command = [__file__, "--parts", str(file), "--model", str(folder / model), "--most", str(most)]
        parts.append(workload.measured(command, work / "parts.json"))
    alone = {name: median(found[name] for found in parts) for name in PHASES}
    whole, total = median(wholes), median(sum(found[name] for name in alone) for found in parts)
    taken = {name: median(found[name] for found in phases) for name in phases[0]}
    return [
        {
            "figure": f"whole iteration, s ({shares(taken)})",
            "workload": f"{model}, {pairs} prompts, answers of {parts[0]['answer']:.0f} tokens on average, batch {BATCH}",
            "value": whole,
            "against": f"its parts alone ({shares(alone)})",
            "other": total,
            "ratio": whole / total,
            "target": "<= 1.03",
        }
    ]


def phases_of(file: Path, whole: float) -> dict[str, float]:
    """Returns the seconds of each phase as a run noted them, and the rest of the whole iteration."""
    noted = json.loads(file.read_text())
    found = {name: noted[f"spin/{name}_seconds"] for name in PHASES}
    return {**found, "rest": whole - sum(found.values())}


def shares(seconds: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.1f} s" for name, value in seconds.items())


def measure_parts(file: Path, folder: Path, most: int) -> dict[str, float]:
    """Returns the seconds of each part, on the pairs that a whole iteration left.

    Args:
        file: The pairs.
        folder: The model's.
        most: Most tokens in an answer.

    Raises:
        ValueError: The answers are not those in the file, so that the two would not be comparable.
    """
    import numpy as np
    import pyarrow.parquet as pq
    import torch
    from accelerate import Accelerator
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from axolotl_spin.data.pairs import PairDataset
    from axolotl_spin.generation.backend import Sampling
    from axolotl_spin.generation.chunks import Chunks, chunk_rows, chunk_size, iteration_seed
    from axolotl_spin.generation.transformers import TransformersBackend
    from axolotl_spin.ranks.main import Ranks
    from axolotl_spin.training.batches import MicroBatches, StepBatches, WeightedRows
    from axolotl_spin.training.layouts import PairCollator
    from axolotl_spin.training.policy import frozen
    from axolotl_spin.training.scoring import Scorer
    from axolotl_spin.training.step import pair_losses

    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    kind = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=kind, attn_implementation="sdpa").to(accelerator.device)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    table = pq.read_table(file)
    prompts, answers = table["prompt_ids"].to_pylist(), table["rejected_ids"].to_pylist()
    eos = model.generation_config.eos_token_id
    stop = tuple(sorted({tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos])}))
    backend = TransformersBackend(Ranks(accelerator), Sampling(1.0, 1.0, None, stop), tokenizer.pad_token_id, BATCH)
    rows = chunk_rows(np.array([len(prompt) for prompt in prompts]), chunk_size(len(prompts), BATCH))
    asked = Dataset.from_dict({"prompt_ids": prompts})
    chunks = Chunks(asked, rows, lambda _: most, iteration_seed(workload.SEED, 0))
    seconds: dict[str, float] = {"answer": sum(map(len, answers)) / len(answers)}
    with frozen(model):
        with timed(seconds, "generation"):
            drawn: list[int] = []
            backend.answer(model, chunks, lambda _, answers: drawn.extend(len(answer.ids) for answer in answers))
        made = sum(drawn)
        if abs(made / sum(map(len, answers)) - 1) > 0.02:
            raise ValueError(f"{made} tokens were answered, but {sum(map(len, answers))} in {file}")
        collator = PairCollator(tokenizer.pad_token_id, "shared", model.config.hidden_size)
        collator.in_head = True  # as a run finds for such models
        dataset = PairDataset(table)
        micro = MicroBatches(len(dataset), micro_batch=BATCH, step=BATCH, seed=workload.SEED, first_epoch=0)
        with timed(seconds, "scoring"):
            Scorer(Ranks(accelerator), collator, "auto").logps(model, dataset, micro)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=workload.LEARNING_RATE, weight_decay=0.0, fused=True)
    order = StepBatches(micro, ranks=1, rank=0, epoch=0)
    weighted = WeightedRows(dataset)
    batches = [
        {name: tensor.to(accelerator.device) for name, tensor in collator([weighted[key] for key in keys]).items()}
        for keys in order
    ]
    with timed(seconds, "training"):
        for batch in batches:
            result = pair_losses(model, batch, beta=0.1, loss_type="sigmoid", sft_weight=0.0, length_normalized=False,
                                 in_head=True)  # fmt: skip
            result.losses.mean().backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    return seconds


@contextmanager
def timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Notes the seconds that the context lasts."""
    import torch

    started = time.perf_counter()
    yield
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    seconds[name] = time.perf_counter() - started


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", type=Path, required=True, help="pairs file of a whole iteration")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--most", type=int, required=True)
    arguments = parser.parse_args()
    figures = measure_parts(arguments.parts, arguments.model, arguments.most)
    Path(os.environ["BENCH_RESULT"]).write_text(json.dumps(figures))
