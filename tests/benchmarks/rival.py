"""The newest TRL's DPOTrainer on ready pairs, with its best options; run by the Python that `.ci/rival-environment` prints.

    python tests/benchmarks/rival.py PAIRS.parquet MODEL BATCH

Reference log-probs are computed before training, no reference model is resident, and the LM head is fused, which is TRL's
default. The very token ids are trained on. The figures go to $BENCH_RESULT.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

from probe import Probe, resident


def main() -> None:
    """Trains an epoch over the pairs."""
    file, model, batch = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    importlib.import_module("trl.trainer.dpo_trainer")
    import pyarrow.parquet as pq
    import torch
    import trl
    import workload
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    on_gpu = torch.cuda.is_available()
    probe = Probe(Path(os.environ["BENCH_RESULT"]), resident())
    kind = {"dtype": torch.bfloat16 if on_gpu else torch.float32, "attn_implementation": "sdpa"}
    policy = AutoModelForCausalLM.from_pretrained(model, **kind)
    config = trl.DPOConfig(
        output_dir=str(file.parent / "trl"), per_device_train_batch_size=batch, gradient_accumulation_steps=1,
        num_train_epochs=1, learning_rate=workload.LEARNING_RATE, lr_scheduler_type="constant", beta=0.1,
        optim="adamw_torch_fused", max_length=None, bf16=on_gpu, use_cpu=not on_gpu, gradient_checkpointing=False,
        remove_unused_columns=False, report_to=[], save_strategy="no", logging_steps=1000, seed=workload.SEED,
        precompute_ref_log_probs=True,
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(model)
    dummy = Dataset.from_dict({"prompt": ["a"], "chosen": [" b"], "rejected": [" c"]})
    trainer: Any = trl.DPOTrainer(
        policy, args=config, train_dataset=dummy, processing_class=tokenizer, callbacks=[probe]
    )
    pairs = pq.read_table(file, columns=["prompt_ids", "chosen_ids", "rejected_ids"])
    ids = Dataset.from_dict(pairs.to_pydict())
    trainer.train_dataset = trainer._precompute_ref_logps(ids, "train", batch)
    trainer.train()
    figures = json.loads(probe.path.read_text())
    versions = {name: importlib.import_module(name).__version__ for name in ("trl", "torch", "transformers")}
    probe.path.write_text(json.dumps({**figures, "versions": versions}))


if __name__ == "__main__":
    main()
