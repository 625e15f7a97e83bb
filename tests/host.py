"""Runs the real host's commands in processes of their own, on one rank or on two."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.parquet as pq
import tiny
import yaml
from packaging.version import Version
from warm import Ranks, Warm

if TYPE_CHECKING:  # `make test-gpu` uses an environment as it is, which may have no pytest
    import pytest

TESTS = Path(__file__).parent
ROOT = TESTS.parent
# real data, beside a checkout
SHARED = ROOT.parent / "shared"

HOST = Version(version("axolotl"))
# the host that the Makefile takes unless told: on the others some tests play less
DEFAULT = str(HOST) == re.findall(r"(?m)^HOST \?= (\S+)$", (ROOT / "Makefile").read_text())[0]
# from 0.21 on the host finds the installed plugin by itself
OURS = ["axolotl_spin.SpinPlugin"] if HOST.release < (0, 21) else []

ZERO = {
    "train_micro_batch_size_per_gpu": 1,
    "gradient_accumulation_steps": 2,
    "gradient_clipping": 1.0,
    "bf16": {"enabled": False},
    "fp16": {"enabled": False},
}
LORA = {"adapter": "lora", "lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.1, "lora_target_linear": True}
# the host switches its fused LoRA kernels on for inference by itself; they need a GPU
LORA |= {f"lora_{part}_kernel": False for part in ("mlp", "qkv", "o")}
FSDP2 = {
    "fsdp_version": 2,
    "fsdp_config": {
        "fsdp_version": 2,
        "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "transformer_layer_cls_to_wrap": "LlamaDecoderLayer",
        "state_dict_type": "FULL_STATE_DICT",
        "reshard_after_forward": True,
    },
}


EIGHT_H100 = {"bf16": True, "fp8": True, "tf32": True, "n_gpu": 8, "compute_capability": "sm_90"}


def config(folder: Path, rows: int = 37, **changes: Any) -> dict[str, Any]:
    """Returns a config over a tiny model and so many conversations, which it makes in `folder` where they are missing."""
    if not (folder / "model").exists():
        tiny.save(folder / "model")
        tiny.conversations(folder / "data.jsonl", rows)
    base = {
        "base_model": str(folder / "model"),
        "plugins": OURS or None,
        "rl": "spin",
        "spin": {"iterations": 2, "generation": {"max_new_tokens": 10, "batch_size": 8}},
        "datasets": [{"path": str(folder / "data.jsonl"), "ds_type": "json", "type": "chat_template"}],
        "chat_template": "tokenizer_default",
        "dataset_prepared_path": str(folder / "prepared"),
        "output_dir": str(folder / "out"),
        "sequence_len": 64,
        "micro_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "num_epochs": 1,
        "optimizer": "adamw_torch",
        "learning_rate": 1e-3,
        "lr_scheduler": "linear",
        "warmup_steps": 2,
        "bf16": False,
        "fp16": False,
        "logging_steps": 1,
        "val_set_size": 0,
        "seed": 7,
    }
    return {key: value for key, value in {**base, **changes}.items() if value is not None}


def layout(name: str, folder: Path) -> dict[str, Any]:
    """Returns the config changes of a layout: `single`, `ddp`, `zero2`, `zero3` or `fsdp2`, with `-lora` or without.

    The global batch is four pairs in each.
    """
    kind, _, adapter = name.partition("-")
    changes: dict[str, Any] = {"output_dir": str(folder / name)}
    if kind != "single":
        changes["micro_batch_size"] = 1
    if kind in ("zero2", "zero3"):
        stage = int(kind[-1])
        zero: dict[str, Any] = {"stage": stage}
        if stage == 3:
            zero["gather_16bit_weights_on_model_save"] = True
        path = folder / f"{kind}.json"
        path.write_text(json.dumps({**ZERO, "zero_optimization": zero}))
        changes["deepspeed"] = str(path)
    if kind == "fsdp2":
        changes.update(FSDP2)
    if kind != "single":
        changes["plugins"] = ["cpu_cluster.CpuClusterPlugin", *OURS]
    if adapter:
        changes.update(LORA)
    return changes


def environment(**extra: str) -> dict[str, str]:
    """Returns the environment of a host process: offline, one thread, without what a launcher left here."""
    drop = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "ACCELERATE_", "AXOLOTL_", "FSDP_")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(drop)}
    path = os.pathsep.join([str(TESTS), *filter(None, [kept.get("PYTHONPATH")])])
    fixed = {
        "HF_HUB_OFFLINE": "1",
        "AXOLOTL_DO_NOT_TRACK": "1",
        "AXOLOTL_DATASET_NUM_PROC": "1",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": path,
        # scripts of this interpreter's environment come first: the host starts `accelerate` by name
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), kept.get("PATH", "")]),
    }
    return {**kept, **fixed, **extra}


@dataclass
class Run:
    """A finished host process and what it left."""

    code: int
    output: str
    out: Path

    def pairs(self, iteration: int) -> Any:
        return pq.read_table(self.out / "spin" / f"iteration-{iteration}" / "pairs.parquet")

    def heldout(self, iteration: int) -> Any:
        return pq.read_table(self.out / "spin" / f"iteration-{iteration}" / "heldout.parquet")

    def metrics(self, iteration: int) -> dict[str, Any]:
        return json.loads((self.out / "spin" / f"iteration-{iteration}" / "metrics.json").read_text())

    def logs(self) -> list[dict[str, Any]]:
        """Returns the rows that the trainer logged, from the last checkpoint."""
        checkpoints = sorted(self.out.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
        return json.loads((checkpoints[-1] / "trainer_state.json").read_text())["log_history"]

    def losses(self) -> list[float]:
        return [row["loss"] for row in self.logs() if "loss" in row]


def validate(text: str, monkeypatch: pytest.MonkeyPatch, ranks: int = 8) -> Any:
    """Runs the host's own registration of plugins and validation, as on machines with eight GPUs."""
    import torch
    from axolotl.utils.config import prepare_plugins, validate_config
    from axolotl.utils.dict import DictDefault

    monkeypatch.chdir(ROOT)  # paths in the examples are relative to the repository
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    cfg = DictDefault(yaml.safe_load(text))
    prepare_plugins(cfg)
    version = str(torch.__version__).split("+")[0]
    return validate_config(cfg, capabilities=EIGHT_H100, env_capabilities={"torch_version": version})


def loaded_a_model(out: Path) -> bool:
    """Whether the last start in an output folder got as far as loading a model, which the host notes in `debug.log`."""
    log = out / "debug.log"
    return log.exists() and "Loading model" in log.read_text(errors="replace")


def write(settings: dict[str, Any]) -> Path:
    """Writes the config beside its output folder and returns its path."""
    out = Path(settings["output_dir"])
    path = out.parent / f"{out.name}.yml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(settings))
    return path


def start(settings: dict[str, Any], *command: str, env: dict[str, str] | None = None, timeout: int = 600) -> Run:
    """Writes the config and runs a command with it; `{config}` in the command is its path.

    Args:
        settings: The config.
        command: Arguments of this environment's Python, the config's path left out as `{config}`.
        env: More environment variables.
        timeout: Seconds.
    """
    path = write(settings)
    arguments = [argument.replace("{config}", str(path)) for argument in command]
    done = subprocess.run(
        [sys.executable, *arguments],
        env=environment(**(env or {})),
        cwd=path.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
    )
    return Run(done.returncode, done.stdout, Path(settings["output_dir"]))


def launcher(kind: str) -> tuple[list[str], dict[str, str]]:
    """Returns the arguments before the host's module, and the environment, of the launch that a layout takes."""
    if kind == "single":
        single = "-m accelerate.commands.launch --cpu --num_processes 1 --num_machines 1 --mixed_precision no"
        return single.split(), {}
    both = "-m torch.distributed.run --nproc_per_node 2 --rdzv-backend c10d --rdzv-endpoint localhost:0"
    return both.split(), rank_environment(kind)


def rank_environment(kind: str) -> dict[str, str]:
    """Returns what makes two ranks of a layout run on a CPU."""
    return {"ACCELERATE_USE_CPU": "true"} if kind == "ddp" else {"DS_ACCELERATOR": "cpu", "CPU_CLUSTER": "1"}


def train(
    settings: dict[str, Any],
    kind: str = "single",
    env: dict[str, str] | None = None,
    fails: bool = False,
    by: Warm | Ranks | None = None,
    timeout: int = 600,
) -> Run:
    """Trains through the host's module, with the launcher that the layout takes or in forks of warm processes.

    Args:
        settings: The config.
        kind: The layout.
        env: More environment variables.
        fails: The run is expected to fail.
        by: What forks a run on one rank, or on two; without it the launcher starts it.
        timeout: Seconds.
    """
    arguments, marks = launcher(kind)
    if by is None:
        module = ("-m", "axolotl.cli.train", "{config}")
        run = start(settings, *arguments, *module, env={**marks, **(env or {})}, timeout=timeout)
    else:
        assert isinstance(by, Warm if kind == "single" else Ranks)
        path = write(settings)
        own = environment(**(marks or {"ACCELERATE_USE_CPU": "true"}), **(env or {}))
        code, output = by.run("axolotl.cli.train", str(path), env=own, cwd=path.parent, timeout=timeout)
        run = Run(code, output, Path(settings["output_dir"]))
    assert (run.code != 0) == fails, run.output[-12000:]
    return run
