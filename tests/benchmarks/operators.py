"""Where the time of a training step goes, by part and operator, beside the least time that the step can take (`floor.py`).

    python tests/benchmarks/operators.py PAIRS.parquet MODEL [--batch 8] [--optimizer adamw_torch_fused]

The pairs are an iteration's, the step is ours (`pair_losses`, backward, clipping, optimizer) in the shared layout without
the host around it. PyTorch's profiler notes what every operator takes itself.
"""

from __future__ import annotations

import argparse
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median
from typing import Any

import floor
import torch
from torch.profiler import ProfilerActivity, profile, record_function

PARTS = ("forward", "backward", "clipping", "optimizer")
HEAD = "_SelectedLogps"  # from logits to log-probs, and back
PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm")
STEPS = 5


def step_of(model: Any, batch: dict[str, Any], optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    """Returns a training step as the trainer takes it, each part under its name."""
    from axolotl_spin.training.step import pair_losses

    def step() -> None:
        with record_function("forward"):
            found = pair_losses(model, batch, beta=0.1, loss_type="sigmoid", sft_weight=0.0, length_normalized=False,
                                in_head=True)  # fmt: skip
            loss = found.losses.mean()
        with record_function("backward"):
            loss.backward()
        with record_function("clipping"):
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        with record_function("optimizer"):
            optimizer.step()
            optimizer.zero_grad()

    return step


def shares(events: Iterable[Any]) -> dict[tuple[str, str], float]:
    """Returns microseconds by part and operator, what each takes itself; log-probs from logits are one operator."""
    taken: Counter[tuple[str, str]] = Counter()
    for event in events:
        above, name, part = event, event.name, ""
        while above is not None:
            if HEAD in above.name:
                name = "log-probs of logits"
            part = above.name if above.name in PARTS else part
            above = above.cpu_parent
        taken[part or "between", "products" if name in PRODUCTS else name] += event.self_cpu_time_total
    return dict(taken)


def table(taken: dict[tuple[str, str], float], least: float, steps: int, smallest: float = 0.005) -> str:
    """Returns the shares as Markdown, the largest first; those below the smallest are one row for each part.

    Args:
        taken: By `shares`, over all steps.
        least: Seconds that a step takes at the least.
        steps: How many were noted.
        smallest: Share of a step.
    """
    whole = sum(taken.values())
    rows: Counter[tuple[str, str]] = Counter()
    for (part, name), count in taken.items():
        plain = name.removeprefix("aten::")
        shown = name if plain == name else f"`{plain}`"
        rows[part, shown if count >= smallest * whole else "rest"] += count
    lines = [
        f"| {part} | {name} | {count / steps / 1000:.0f} | {count / whole:.1%} |"
        for (part, name), count in rows.most_common()
    ]
    lines += [f"| all | | {whole / steps / 1000:.0f} | 100% |",
              f"| least | | {1000 * least:.0f} | {1e6 * least * steps / whole:.1%} |"]  # fmt: skip
    return "\n".join(["| part | operator | ms a step | share |", "|---|---|---|---|", *lines])


def speeds(events: Iterable[Any], machine: float, steps: int, smallest: float = 0.02) -> str:
    """Returns the products by their sizes, the longest first, and what share of the machine's speed each reaches.

    Args:
        events: Noted with their shapes.
        machine: Operations a second of large products, by `floor`.
        steps: How many were noted.
        smallest: Share of the time of all products.
    """
    taken: Counter[tuple[int, ...]] = Counter()
    counts: Counter[tuple[int, ...]] = Counter()
    for event in events:
        if event.name in PRODUCTS:
            left, right = [shape for shape in event.input_shapes if len(shape) > 1][-2:]
            taken[*left, right[-1]] += event.self_cpu_time_total
            counts[*left, right[-1]] += 1
    lines = [
        f"| {' x '.join(map(str, size))} | {counts[size] // steps} | {count / steps / 1000:.0f} | "
        f"{2e6 * math.prod(size) * counts[size] / count / machine:.0%} |"
        for size, count in taken.most_common()
        if count >= smallest * taken.total()
    ]
    return "\n".join(["| product | of them | ms a step | of the machine's speed |", "|---|---|---|---|", *lines])


def main() -> None:
    """Prints the tables of a step."""
    import pyarrow.parquet as pq
    from transformers import AutoModelForCausalLM

    from axolotl_spin.data.pairs import PairDataset
    from axolotl_spin.training.layouts import PairCollator

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", type=Path)
    parser.add_argument("model", type=Path)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--optimizer", choices=("adamw_torch", "adamw_torch_fused"), default="adamw_torch_fused")
    given = parser.parse_args()
    rows = pq.read_table(given.pairs).slice(0, given.batch)
    model = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32, attn_implementation="sdpa").train()
    pairs = [{**PairDataset(rows)[row], "weight": 1.0} for row in range(len(rows))]
    for pair in pairs:  # a loss of ln 2, as at an iteration's start, is of no matter here
        pair.setdefault("opponent_chosen_logp", -50.0)
        pair.setdefault("opponent_rejected_logp", -50.0)
    batch = PairCollator(0, "shared", model.config.hidden_size)(pairs)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=given.optimizer.endswith("fused"))
    step = step_of(model, batch, optimizer)
    step()
    seconds = []
    for _ in range(STEPS):
        begun = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - begun)
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as noted:
        for _ in range(STEPS):
            step()
    machine = floor.matrix_speed()
    least = floor.operations(given.model, floor.of_pairs(pairs)) / machine
    tokens = batch["input_ids"]
    print(f"{given.batch} pairs, {tokens.shape[0]} rows of {tokens.shape[1]} tokens, {given.optimizer}: "
          f"{median(seconds):.2f} s a step without the profiler, {least:.2f} s at the least")  # fmt: skip
    print(table(shares(noted.events()), least, STEPS))
    print(speeds(noted.events(), machine, STEPS))


if __name__ == "__main__":
    main()
