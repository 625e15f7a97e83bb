"""Two iterations of an architecture through the host's command, and what shows that they are right."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import architectures
import host
import torch
from safetensors.torch import load_file
from warm import Warm

_LINE = re.compile(r"pairs are laid out (\w+): (.*); log-probs are taken (.*)")
_TRIED_ALONE = 6  # answers that are drawn again by a loop without a cache
_END = 6
# two logits so close that another order of sums may exchange them
_TIE = 1e-4


@dataclass(frozen=True)
class Figures:
    """What a run of two iterations showed.

    Attributes:
        layout, why: Of the pairs.
        in_head: Whether log-probs were taken in the LM head.
        first_losses: Of both iterations.
        off: The opponent's log-probs from those of one unpadded sequence at a time, the largest, in nats per token.
        same: Greedy answers that a loop without a cache gives, of all that it was asked for.
        asked: How many that were.
        missing: Weights that the saved model lacks, or has too many.
        moved: Modules, as they stand in the model, whose saved weights are others than the start's.
    """

    layout: str
    why: str
    in_head: bool
    first_losses: tuple[float, float]
    off: float
    same: int
    asked: int
    missing: tuple[str, ...]
    moved: frozenset[str]

    def measured(self) -> dict[str, Any]:
        """Returns what stands in the table of the documentation."""
        losses = [round(loss, 6) for loss in self.first_losses]
        where = {"layout": self.layout, "why": self.why, "in_head": self.in_head}
        return {
            **where,
            "first_losses": losses,
            "off": float(f"{self.off:.1e}"),
            "same": self.same,
            "asked": self.asked,
        }


def settings_of(folder: Path, **changes: Any) -> dict[str, Any]:
    """Returns the config of the run: every answer the most probable one, steps that move the model."""
    spin = {"iterations": 2, "history": 0, "generation": {"max_new_tokens": 10, "batch_size": 4, "temperature": 0}}
    base = {"spin": spin, "gradient_accumulation_steps": 1, "learning_rate": 5e-3, "warmup_steps": 0}
    base["tokenizer_type"] = "PreTrainedTokenizerFast"  # else it is made anew in the way of the architecture's own
    return host.config(folder, rows=12, **{**base, **changes})


def play(name: str, folder: Path, warm: Warm) -> Figures:
    """Runs an architecture's tiny model and compares what it left with the plainest way to compute it.

    Args:
        name: Of the architecture.
        folder: An empty one.
        warm: What forks the run.
    """
    import tiny

    architectures.save(name, folder / "model")
    tiny.conversations(folder / "data.jsonl", 12)
    run = host.train(settings_of(folder, **architectures.ARCHITECTURES[name].run), by=warm)
    assert "padding moves" not in run.output
    layout, why, where = _LINE.findall(run.output)[0]
    model, missing = loaded(name, run.out / "spin" / "iteration-0" / "model")
    losses, rows = run.losses(), run.pairs(1).to_pylist()
    found = [same_answer(model, row) for row in rows[:_TRIED_ALONE]]
    return Figures(
        layout,
        why,
        "head" in where,
        (losses[0], losses[len(losses) // 2]),
        max(off_alone(model, row) for row in rows),
        sum(found),
        len(found),
        missing,
        moved(folder / "model", run.out / "spin" / "iteration-1" / "model"),
    )


def loaded(name: str, folder: Path) -> tuple[Any, tuple[str, ...]]:
    """Returns a saved model, and what its files lack or have too much."""
    model, told = architectures.model_class(name).from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    wrong = [str(key) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for key in told[kind]]
    return model.eval(), tuple(sorted(wrong))


@torch.no_grad()
def off_alone(model: Any, row: dict[str, Any]) -> float:
    """Returns how far the opponent's log-probs of a pair are from those of its unpadded sequences, in nats per token."""
    prompt, worst = row["prompt_ids"], 0.0
    for kind in ("chosen", "rejected"):
        answer = row[f"{kind}_ids"]
        logits = model(input_ids=torch.tensor([prompt + answer]), use_cache=False).logits[0, len(prompt) - 1 : -1]
        logps = logits.double().log_softmax(-1)[range(len(answer)), answer].sum().item()
        off = abs(logps - row[f"opponent_{kind}_logp"]) / len(answer)
        worst = off if math.isnan(off) else max(worst, off)
    return worst


@torch.no_grad()
def same_answer(model: Any, row: dict[str, Any]) -> bool:
    """Whether a loop that gives the model the whole sequence for each token answers the same, to its end."""
    ids, answer = list(row["prompt_ids"]), row["rejected_ids"]
    for token in answer:
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
        if logits[token] < logits.max() - _TIE:
            return False
        ids.append(token)
    return _END not in answer[:-1] and (answer[-1] == _END) == (row["finish_reason"] == "stop")


def moved(before: Path, after: Path) -> frozenset[str]:
    """Returns the modules whose weights differ between two saved models, by the first two parts of their names."""
    first, second = (load_file(folder / "model.safetensors") for folder in (before, after))
    names = {name for name in first.keys() & second.keys() if not torch.equal(first[name], second[name])}
    return frozenset(".".join(name.split(".")[:2]) for name in names)
