"""Training on ready pairs: SPIN's layouts against TRL's DPOTrainer with a resident reference model, and SFT by the host.

Every contestant is a process of its own, in turn, so that what else the machine does hits all of them. SPIN answers the
prompts once, before, in at most 32 tokens, about what the human answers have; its runs then find the pairs on disk, and
TRL reads the very token ids. SFT trains on rows that have as many tokens a step as the largest step of the shared layout,
none of them padding.

Called by `run.py`; with `--trl` it is the TRL contestant itself.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from itertools import chain, cycle, islice
from pathlib import Path
from statistics import median
from typing import Any

import workload
from probe import Probe, baseline

TARGETS = {"shared": ">= 2.5", "packed": ">= 1.8", "padded": ""}


def measure(
    folder: Path, model: str, *, batch: int, steps: int, repeats: int, layouts: tuple[str, ...] = ("shared", "packed")
) -> list[dict[str, Any]]:
    """Returns rows of the table: speed against TRL, memory against TRL and against SFT by the host.

    Args:
        folder: Of `workload.prepare`.
        model: One of `workload.MODELS`.
        batch: Pairs in a step, which is one forward and backward pass.
        steps: In a run; the first one is left out.
        repeats: Of each contestant; medians count.
        layouts: SPIN's; "shared" among them.
    """
    work = folder / "training" / model
    shutil.rmtree(work, ignore_errors=True)
    config, ready = workload.with_pairs(work, folder, model, pairs=batch * steps, most=32, batch=batch)
    file = ready / "spin" / "iteration-0" / "pairs.parquet"
    found: dict[str, list[dict[str, Any]]] = {}
    for _ in range(repeats):
        for layout in layouts:
            shutil.rmtree(work / "out", ignore_errors=True)
            shutil.copytree(ready, work / "out")
            found.setdefault(layout, []).append(workload.run(work, config, BENCH_LAYOUT=layout))
        command = [__file__, "--trl", str(file), "--model", str(folder / model), "--batch", str(batch)]
        found.setdefault("trl", []).append(workload.measured(command, work / "trl.json"))
        found.setdefault("sft", []).append(_sft(folder, model, work, file, found["shared"][0]["most_tokens"]))
    speed = {name: batch / median(run["step_seconds"] for run in runs) for name, runs in found.items()}
    gib = {name: median(run["peak_bytes"] for run in runs) / 2**30 for name, runs in found.items()}
    tokens = token_counts(file)
    about = f"{model}, {tokens['prompt']:.0f} + {tokens['chosen']:.0f} / {tokens['rejected']:.0f} tokens a pair"
    rows = [
        {
            "figure": f"training, pairs/s, {layout}",
            "workload": f"{about}, batch {batch}",
            "value": speed[layout],
            "against": "TRL DPOTrainer with its reference",
            "other": speed["trl"],
            "ratio": speed[layout] / speed["trl"],
            "target": TARGETS[layout],
        }
        for layout in layouts
    ]
    ours, theirs = found["shared"][0]["most_tokens"], found["sft"][0]["most_tokens"]
    return [
        *rows,
        {
            "figure": "peak memory of a step, GiB, shared",
            "workload": f"{about}, batch {batch}",
            "value": gib["shared"],
            "against": "TRL DPOTrainer with its reference",
            "other": gib["trl"],
            "ratio": gib["shared"] / gib["trl"],
            "target": "<= 0.55",
        },
        {
            "figure": "peak memory of a step per token, MiB, shared",
            "workload": f"{model}, {ours} and {theirs} tokens a step",
            "value": 1024 * gib["shared"] / ours,
            "against": "SFT by the host",
            "other": 1024 * gib["sft"] / theirs,
            "ratio": gib["shared"] / ours / (gib["sft"] / theirs),
            "target": "<= 1.1",
        },
    ]


def token_counts(file: Path) -> dict[str, float]:
    """Returns the mean tokens of prompts, human answers and the opponent's."""
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    pairs = pq.read_table(file, columns=["prompt_ids", "chosen_ids", "rejected_ids"])
    return {
        name.removesuffix("_ids"): pc.mean(pc.list_value_length(pairs[name])).as_py() for name in pairs.column_names
    }


def _sft(folder: Path, model: str, work: Path, file: Path, tokens: int) -> dict[str, Any]:
    """Trains by the host on human answers cut into rows of one length, `tokens` in a step."""
    import pyarrow.parquet as pq

    steps, length = 3, 128  # the host pads rows to a multiple of 64
    batch = max(1, round(tokens / length))
    pairs = pq.read_table(file, columns=["prompt_ids", "chosen_ids"]).to_pylist()
    stream = cycle(chain.from_iterable(pair["prompt_ids"] + pair["chosen_ids"] for pair in pairs))
    rows = [list(islice(stream, length)) for _ in range(steps * batch)]
    data = work / "sft" / "data.jsonl"
    shutil.rmtree(data.parent, ignore_errors=True)
    data.parent.mkdir(parents=True)
    lines = [json.dumps({"input_ids": ids, "attention_mask": [1] * length, "labels": ids}) for ids in rows]
    data.write_text("\n".join(lines) + "\n")
    changes = {
        "rl": None,
        "spin": None,
        "plugins": ["probe.BenchPlugin"],
        "datasets": [{"path": str(data), "ds_type": "json", "type": None}],
        "dataset_prepared_path": str(data.parent / "prepared"),
        "sample_packing": False,
        "micro_batch_size": batch,
        "output_dir": str(data.parent / "out"),
    }
    return workload.run(data.parent, workload.settings(folder, model, **changes))


def train_by_trl(file: Path, model: Path, batch: int) -> None:
    """Trains an epoch over a pairs file with TRL's defaults and a reference model beside the policy."""
    import pyarrow.parquet as pq
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    on_gpu = torch.cuda.is_available()
    before = baseline()
    kind = {"dtype": torch.bfloat16 if on_gpu else torch.float32, "attn_implementation": "sdpa"}
    policy, reference = (AutoModelForCausalLM.from_pretrained(model, **kind) for _ in range(2))
    config = DPOConfig(
        output_dir=str(file.parent / "trl"), per_device_train_batch_size=batch, gradient_accumulation_steps=1,
        num_train_epochs=1, learning_rate=workload.LEARNING_RATE, lr_scheduler_type="constant", beta=0.1,
        optim="adamw_torch", max_length=None, bf16=on_gpu, use_cpu=not on_gpu, gradient_checkpointing=False,
        remove_unused_columns=False, report_to=[], save_strategy="no", logging_steps=1000, seed=workload.SEED,
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(model)
    dummy = Dataset.from_dict({"prompt": ["a"], "chosen": [" b"], "rejected": [" c"]})
    probe = Probe(Path(os.environ["BENCH_RESULT"]), before)
    trainer = DPOTrainer(
        policy, reference, args=config, train_dataset=dummy, processing_class=tokenizer, callbacks=[probe]
    )
    pairs = pq.read_table(file, columns=["prompt_ids", "chosen_ids", "rejected_ids"])
    trainer.train_dataset = Dataset.from_dict(pairs.to_pydict())  # the very token ids
    trainer.train()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trl", type=Path, required=True, help="pairs file to train on")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--batch", type=int, required=True)
    arguments = parser.parse_args()
    train_by_trl(arguments.trl, arguments.model, arguments.batch)
