"""Answering prompts with vLLM: SPIN's backend against `vllm.LLM.generate` alone and against SPIN's other backend.

SPIN_VLLM_PYTHON names the Python of vLLM's environment; without it nothing is measured. All answer the same prompts, with
the same limits, in turn; starting an engine is not counted in tokens per second but shown apart. Called by `run.py`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import workload


def measure(folder: Path, model: str, *, prompts: int, most: int, repeats: int) -> list[dict[str, Any]]:
    """Returns the rows of the table.

    Args:
        folder: Of `workload.prepare`.
        model: One of `workload.MODELS`.
        prompts: How many are answered.
        most: Most tokens in an answer.
        repeats: Of each contestant; medians count.
    """
    if not os.environ.get("SPIN_VLLM_PYTHON"):
        print("vllm: left out, since SPIN_VLLM_PYTHON names no Python with vLLM", file=sys.stderr)
        return []
    result = folder / f"vllm-{model}.json"
    found = workload.measured([__file__, str(folder), model, str(prompts), str(most), str(repeats)], result)
    what = f"{model}, {prompts} prompts of {found['prompt']:.0f} tokens, answers of {found['answer']:.0f} tokens on average"
    rates, starts, writes = found["rates"], found["starts"], found["writes"]

    def row(figure: str, value: float, against: str, other: float, target: str) -> dict[str, Any]:
        return {"figure": figure, "workload": what, "value": value, "against": against, "other": other,
                "ratio": value / other, "target": target}  # fmt: skip

    ours = median(rates["spin"])
    figure = "generation with vLLM, tokens/s"
    return [
        row(figure, ours, "vLLM alone, in its own processes (its default)", median(rates["bare"]), ">= 0.97"),
        row(figure, ours, "vLLM alone, in one process", median(rates["bare in one process"]), ">= 0.97"),
        row(figure, ours, "SPIN's transformers backend, batch 32", median(rates["transformers"]), "reported"),
        row(
            "engine start-up, s", median(starts["spin"]), "vLLM alone (its default)", median(starts["bare"]), "reported"
        ),
        row("writing the opponent, s", median(writes), "one answer phase", found["phase"], "reported"),
    ]


def compete(folder: Path, name: str, count: int, most: int, repeats: int) -> dict[str, Any]:
    """Runs all contestants in turn and returns their tokens per second and start-up seconds."""
    import numpy as np
    import torch
    from accelerate import Accelerator
    from datasets import Dataset
    from transformers import AutoModelForCausalLM

    from axolotl_spin.disk.directory import RunDirectory
    from axolotl_spin.generation.backend import Sampling
    from axolotl_spin.generation.chunks import Chunks, chunk_rows
    from axolotl_spin.generation.transformers import TransformersBackend
    from axolotl_spin.generation.vllm.backend import VllmBackend, sampling_arguments
    from axolotl_spin.generation.vllm.engine import environment
    from axolotl_spin.generation.vllm.served import ServedModel
    from axolotl_spin.ranks.main import Ranks
    from axolotl_spin.settings.generation import VllmConfig

    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    on_gpu = torch.cuda.is_available()
    kind = torch.bfloat16 if on_gpu else torch.float32
    model = AutoModelForCausalLM.from_pretrained(folder / name, dtype=kind, attn_implementation="sdpa").eval()
    model = model.to(accelerator.device)
    asked = workload.prompts_of(folder, name, count)
    asked = [asked[row % len(asked)] for row in range(count)]
    eos = model.generation_config.eos_token_id
    sampling = Sampling(1.0, 1.0, None, tuple(eos) if isinstance(eos, list) else (eos,))
    longest = max(map(len, asked)) + most
    chosen: dict[str, Any] = {"python": os.environ["SPIN_VLLM_PYTHON"], "enforce_eager": not on_gpu}
    chosen |= {"gpu_memory_utilization": 0.4} if on_gpu else {"kv_cache_memory_bytes": 1 << 30}
    settings = VllmConfig.model_validate(chosen)
    served = ServedModel(str(folder / name), None, False, str(kind).removeprefix("torch."), None, False, longest)
    scratch = folder / "vllm"
    chunks = Chunks(Dataset.from_dict({"prompt_ids": asked}), chunk_rows(np.array([len(p) for p in asked]), 32),
                    lambda _: most, seed=1)  # fmt: skip
    rates: dict[str, list[float]] = {key: [] for key in ("spin", "bare", "bare in one process", "transformers")}
    starts: dict[str, list[float]] = {"spin": [], "bare": [], "bare in one process": []}
    writes, phases, tokens = [], [], []
    threads = {"OMP_NUM_THREADS": str(os.cpu_count())}

    def answered(backend: Any, number: int) -> tuple[int, float, dict[str, float]]:
        made: list[int] = []
        ended: list[float] = []

        def keep(_: Any, completions: Any) -> None:
            made.extend(len(completion.ids) for completion in completions)
            ended.append(time.perf_counter())

        figures = backend.answer(model, chunks, keep, number)
        return sum(made), ended[-1], figures

    class Clock(Ranks):
        started = 0.0

        def start_clock(self) -> None:
            self.started = time.perf_counter()

    for _ in range(repeats):
        for mode in ("bare", "bare in one process"):
            job = {"engine": served.arguments(settings), "prompts": asked, "most": most, "repeats": 1,
                   "sampling": sampling_arguments(sampling), "report": str(scratch / "bare.json")}  # fmt: skip
            scratch.mkdir(exist_ok=True)
            (scratch / "job.json").write_text(json.dumps(job))
            changes = threads if mode == "bare" else {**threads, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
            env = {**environment(chosen["python"], changes)}
            if mode == "bare":
                env.pop("VLLM_ENABLE_V1_MULTIPROCESSING")
            script = Path(__file__).with_name("bare_vllm.py")
            with open(scratch / "bare.log", "w") as log:
                subprocess.run(
                    [chosen["python"], script, scratch / "job.json"], env=env, check=True, stdout=log, stderr=log
                )
            bare = json.loads((scratch / "bare.json").read_text())
            rates[mode].append(sum(bare["tokens"]) / sum(bare["seconds"]))
            starts[mode].append(bare["start"])
        clock = Clock(accelerator)
        started = time.perf_counter()
        backend = VllmBackend(clock, sampling, settings, served, RunDirectory(scratch), model.save_pretrained,
                              lambda: None)  # fmt: skip
        made, ended, apart = answered(backend, 0)
        rates["spin"].append(made / (ended - clock.started))
        starts["spin"].append(apart["spin/engine_start_seconds"])
        writes.append(apart["spin/opponent_write_seconds"])
        phases.append(time.perf_counter() - started)
        tokens.append(made)
        started = time.perf_counter()
        made, ended, _ = answered(TransformersBackend(Ranks(accelerator), sampling, sampling.stop_token_ids[0], 32), 0)
        rates["transformers"].append(made / (ended - started))
    mean = sum(map(len, asked)) / len(asked)
    return {"rates": rates, "starts": starts, "writes": writes, "phase": median(phases), "prompt": mean,
            "answer": sum(tokens) / len(tokens) / len(asked)}  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("model")
    for number in ("prompts", "most", "repeats"):
        parser.add_argument(number, type=int)
    given = parser.parse_args()
    figures = compete(given.folder, given.model, given.prompts, given.most, given.repeats)
    Path(os.environ["BENCH_RESULT"]).write_text(json.dumps(figures))
