"""Answering prompts: SPIN's default backend against a plain `generate` loop in dataset order, at the same batch size.

Both draw from the same model at temperature 1 with the same limits; in turn, in one process. The backend gets its prompts
in chunks of eight batches, as a run of 128 batches and more gives them. Called by `run.py`.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from statistics import median
from typing import Any

import workload


def measure(folder: Path, model: str, *, prompts: int, batch: int, most: int, repeats: int) -> list[dict[str, Any]]:
    """Returns the row of the table.

    Args:
        folder: Of `workload.prepare`.
        model: One of `workload.MODELS`.
        prompts: How many are answered.
        batch: Answers written at once.
        most: Most tokens in an answer.
        repeats: Of each contestant; medians count.
    """
    numbers = [str(number) for number in (prompts, batch, most, repeats)]
    result = folder / f"generation-{model}.json"
    found = workload.measured([__file__, str(folder), model, *numbers], result)
    ours, plain = median(found["spin"]), median(found["plain"])
    return [
        {
            "figure": "generation, tokens/s",
            "workload": f"{model}, {prompts} prompts of {found['prompt']:.0f} tokens, batch {batch}, answers of "
            f"{found['answer']:.0f} tokens on average and {most} at most",
            "value": ours,
            "against": "a plain generate loop",
            "other": plain,
            "ratio": ours / plain,
            "target": ">= 2",
        }
    ]


def compete(folder: Path, name: str, count: int, batch: int, most: int, repeats: int) -> dict[str, Any]:
    """Runs both contestants in turn and returns their tokens per second."""
    import numpy as np
    import torch
    from accelerate import Accelerator
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, GenerationConfig

    from axolotl_spin.generation.backend import Sampling, cut
    from axolotl_spin.generation.chunks import Chunks, chunk_rows, chunk_size
    from axolotl_spin.generation.decoding import left_padded
    from axolotl_spin.generation.transformers import TransformersBackend
    from axolotl_spin.ranks.main import Ranks

    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    kind = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    model = AutoModelForCausalLM.from_pretrained(folder / name, dtype=kind, attn_implementation="sdpa").eval()
    model = model.to(accelerator.device)
    prompts = workload.prompts_of(folder, name, count)
    eos = model.generation_config.eos_token_id
    stop = tuple(eos) if isinstance(eos, list) else (eos,)
    backend = TransformersBackend(Ranks(accelerator), Sampling(1.0, 1.0, None, stop), stop[0], batch)
    asked = Dataset.from_dict({"prompt_ids": prompts})
    cuts = chunk_rows(np.array([len(prompt) for prompt in prompts]), chunk_size(16 * 8 * batch, batch))
    sampling = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        max_new_tokens=most,
        eos_token_id=list(stop),
        pad_token_id=stop[0],
    )

    def spin(seed: int) -> int:
        chunks = Chunks(asked, cuts, lambda _: most, seed)
        made: list[int] = []
        backend.answer(model, chunks, lambda _, answers: made.extend(len(answer.ids) for answer in answers))
        return sum(made)

    @torch.no_grad()
    def plain(seed: int) -> int:
        torch.manual_seed(seed)
        total = 0
        for start in range(0, len(prompts), batch):
            part = [torch.tensor(prompt) for prompt in prompts[start : start + batch]]
            ids, mask = left_padded(part, stop[0]), left_padded([torch.ones_like(prompt) for prompt in part], 0)
            ids, mask = ids.to(accelerator.device), mask.to(accelerator.device)
            drawn = model.generate(input_ids=ids, attention_mask=mask, generation_config=sampling)
            total += sum(len(cut(row, most, stop).ids) for row in drawn[:, ids.shape[1] :].tolist())
        return total

    rates: dict[str, list[float]] = {"spin": [], "plain": []}
    tokens = 0
    for seed in range(repeats):
        for contestant in (plain, spin):
            started = time.perf_counter()
            made = contestant(seed)
            rates[contestant.__name__].append(made / (time.perf_counter() - started))
            tokens += made
    mean = sum(map(len, prompts)) / len(prompts)
    return {**rates, "prompt": mean, "answer": tokens / (2 * repeats * len(prompts))}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("model")
    for number in ("prompts", "batch", "most", "repeats"):
        parser.add_argument(number, type=int)
    given = parser.parse_args()
    figures = compete(given.folder, given.model, given.prompts, given.batch, given.most, given.repeats)
    Path(os.environ["BENCH_RESULT"]).write_text(json.dumps(figures))
