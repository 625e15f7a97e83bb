"""The least time that a step of training can take: its operations over the machine's own matrix speed.

    python tests/benchmarks/floor.py RESULT.json

measures that speed. Operations are counted from the model's shapes. Every weight of a linear layer multiplies and adds once
for each token, every channel of a query twice for each key that it sees. The LM head is needed where an answer's token is
predicted. A backward pass takes twice what the forward does. A pair has the tokens of its prompt once, and those of both
answers. Whatever else a step does counts as nothing: norms, softmax, the optimizer, data, padding.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

SIDE = 2048  # of the matrices whose product is timed; on a GPU four times that
REPEATS = 7


class Work(NamedTuple):
    """What a step has to go through.

    Attributes:
        tokens: Through the layers.
        seen: Keys that the queries see, summed over the queries.
        predicted: Tokens that are predicted, each by a row of the LM head's output.
    """

    tokens: int
    seen: int
    predicted: int


def of_pairs(pairs: Sequence[dict[str, Sequence[int]]]) -> Work:
    """Returns the work of pairs, each with `prompt_ids`, `chosen_ids` and `rejected_ids`."""
    tokens = seen = predicted = 0
    for pair in pairs:
        prompt, chosen, rejected = (len(pair[f"{name}_ids"]) for name in ("prompt", "chosen", "rejected"))
        tokens += prompt + chosen + rejected
        seen += _causal(prompt + chosen) + _causal(prompt + rejected) - _causal(prompt)
        predicted += chosen + rejected
    return Work(tokens, seen, predicted)


def of_rows(rows: int, length: int) -> Work:
    """Returns the work of SFT on rows of one length, all of whose tokens are predicted."""
    return Work(rows * length, rows * _causal(length), rows * length)


def _causal(length: int) -> int:
    return length * (length + 1) // 2


def operations(model: Path, work: Work) -> float:
    """Returns the floating-point operations of a forward and a backward pass; a multiplication and an addition are two.

    Args:
        model: Folder of a model whose layers are linear layers and full attention.
        work: Of the step.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(model)
    with torch.device("meta"):
        made = AutoModelForCausalLM.from_config(config)
    layers = {name: part for name, part in made.named_modules() if isinstance(part, torch.nn.Linear)}
    head = layers.pop("lm_head").weight.numel()
    linear = sum(part.weight.numel() for part in layers.values())
    width = config.num_attention_heads * (
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    forward = 2 * linear * work.tokens + 4 * width * config.num_hidden_layers * work.seen + 2 * head * work.predicted
    return 3.0 * forward


def matrix_speed() -> float:
    """Returns the operations a second of the best of a few products of large matrices, in the type that is trained in."""
    import torch

    on_gpu = torch.cuda.is_available()
    side, kind = (4 * SIDE, torch.bfloat16) if on_gpu else (SIDE, torch.float32)
    left, right = (torch.randn(side, side, dtype=kind, device="cuda" if on_gpu else "cpu") for _ in range(2))
    best = float("inf")
    for _ in range(REPEATS):
        begun = time.perf_counter()
        left @ right
        if on_gpu:
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - begun)
    return 2 * side**3 / best


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps({"speed": matrix_speed()}))
