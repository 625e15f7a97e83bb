"""Models, data and runs that the benchmarks share."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
REAL = ROOT.parent / "shared" / "data" / "dolly_openqa_short_train.jsonl"
OURS = ["axolotl_spin.SpinPlugin"]
MODELS = ("smollm2", "llama")
# a Llama of medium size with random weights, for a CPU; and one of a billion for a GPU
MEDIUM = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 8, "num_attention_heads": 12}
BILLION = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32}

ENDING = 32
SEED = 7
LEARNING_RATE = 1e-6


def prepare(folder: Path) -> None:
    """Makes the models and `data.jsonl` where they are missing; needs what the quickstart needs."""
    sys.path.insert(0, str(ROOT / "example_configs" / "quickstart"))
    import prepare as quickstart

    quickstart.make_model(folder / "smollm2")
    if not (folder / "llama").exists():
        import torch
        from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        tokenizer = AutoTokenizer.from_pretrained(folder / "smollm2")
        shape = BILLION if torch.cuda.is_available() else MEDIUM
        ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": 2}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **shape, **ids))
        # random weights like all tokens alike: with one in ENDING that ends an answer, lengths vary as people's do
        model.generation_config.eos_token_id = [2, *range(ENDING, len(tokenizer), ENDING)]
        model.save_pretrained(folder / "llama")
        tokenizer.save_pretrained(folder / "llama")
    if REAL.exists():
        (folder / "data.jsonl").write_text(REAL.read_text())
    elif not (folder / "data.jsonl").exists():
        quickstart.make_data(folder / "data", 200, 32, 2)
        (folder / "data" / "train.jsonl").rename(folder / "data.jsonl")


def settings(folder: Path, model: str, **changes: Any) -> dict[str, Any]:
    """Returns a SPIN config of one iteration over real rows."""
    import torch

    on_gpu = torch.cuda.is_available()
    return {
        "base_model": str(folder / model),
        "plugins": ["bench_plugin.BenchPlugin", *OURS],
        "rl": "spin",
        "spin": {"iterations": 1, "save_iterations": False},
        "datasets": [{"path": str(folder / "data.jsonl"), "ds_type": "json", "type": "chat_template"}],
        "chat_template": "tokenizer_default",
        "dataset_prepared_path": str(folder / "prepared"),
        "sequence_len": 256,
        "micro_batch_size": 8,
        "gradient_accumulation_steps": 1,
        "num_epochs": 1,
        "optimizer": "adamw_torch_fused",
        "learning_rate": LEARNING_RATE,
        "lr_scheduler": "constant",
        "warmup_steps": 0,
        "bf16": on_gpu,
        "fp16": False,
        "attn_implementation": "sdpa",
        "save_strategy": "no",
        "val_set_size": 0,
        "logging_steps": 1000,
        "seed": SEED,
        **changes,
    }


def with_pairs(
    work: Path, folder: Path, model: str, *, pairs: int, most: int, batch: int
) -> tuple[dict[str, Any], Path]:
    """Has the model answer so many prompts, and stops before the first step.

    Args:
        work: Where the run is.
        folder: Of `prepare`.
        model: One of `MODELS`.
        pairs: How many.
        most: Most tokens in an answer.
        batch: Pairs in a step of training.

    Returns:
        The config, whose `output_dir` is `work / "out"`, and a folder that can be copied there: training on the pairs is
        all that is left to do.
    """
    spin = {"iterations": 1, "save_iterations": False, "max_prompts": pairs, "generation": {"max_new_tokens": most}}
    config = settings(folder, model, spin=spin, micro_batch_size=batch, output_dir=str(work / "out"))
    run(work, config, BENCH_STOP="pairs")
    ready = work / "ready"
    (work / "out").rename(ready)
    return config, ready


def run(folder: Path, config: dict[str, Any], *, launcher: Sequence[str] = (), **env: str | None) -> dict[str, Any]:
    """Runs the host's command in a process of its own.

    Args:
        folder: For its config and result.
        config: Of the host; keys that are None are left out.
        launcher: Arguments of Python before the host's module.
        env: See `measured`.

    Returns:
        What the probe wrote.

    Raises:
        RuntimeError: The run failed; with the end of its output.
    """
    folder.mkdir(parents=True, exist_ok=True)
    result = folder / "result.json"
    path = folder / "run.yml"
    path.write_text(yaml.safe_dump({key: value for key, value in config.items() if value is not None}))
    return measured([*launcher, "-m", "axolotl.cli.train", str(path)], result, **env)


def measured(command: list[str], result: Path, *, python: str = sys.executable, **env: str | None) -> dict[str, Any]:
    """Runs a Python command in a process of its own and reads the figures that it wrote to `result`.

    Args:
        command: Arguments of Python.
        result: Where the command is told to write its figures.
        python: By which it runs.
        env: More environment variables; None takes one away.

    Raises:
        RuntimeError: The command failed; with the end of its output.
    """
    search = os.pathsep.join([str(HERE), str(HERE.parent), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    fixed: dict[str, str | None] = {
        "HF_HUB_OFFLINE": "1",
        "AXOLOTL_DO_NOT_TRACK": "1",
        "OMP_NUM_THREADS": os.environ.get("BENCH_THREADS", str(os.cpu_count())),
        "OMP_WAIT_POLICY": "PASSIVE",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": search,
        "BENCH_RESULT": str(result),
    }
    import torch

    if not torch.cuda.is_available():
        fixed["ACCELERATE_USE_CPU"] = "true"
    result.unlink(missing_ok=True)
    variables = {name: value for name, value in {**os.environ, **fixed, **env}.items() if value is not None}
    done = subprocess.run([python, *command], env=variables, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{(done.stdout + done.stderr)[-4000:]}")
    return json.loads(result.read_text()) if result.exists() else {}


def prompts_of(folder: Path, model: str, count: int) -> list[list[int]]:
    """Returns the first prompts of the data as token ids, by the model's own template."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / model)
    rows = [json.loads(line)["messages"] for line in (folder / "data.jsonl").read_text().splitlines()[:count]]
    return [
        tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=False) for messages in rows
    ]
