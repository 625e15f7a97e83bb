"""A run before any model is loaded: settings, prompts, plan, and the check that `OUTPUT_DIR/spin` belongs to it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from axolotl_spin.args import SpinConfig, spin_config
from axolotl_spin.artifacts import RunDirectory, read_json, write_json
from axolotl_spin.plan import Plan, make_plan
from axolotl_spin.prompts import prompt_dataset

# host keys that the result depends on, beside the prompts themselves and the spin block
_HOST_KEYS = (
    "base_model",
    "adapter",
    "lora_r",
    "lora_alpha",
    "lora_target_modules",
    "lora_target_linear",
    "lora_model_dir",
    "peft_use_dora",
    "load_in_4bit",
    "load_in_8bit",
    "bf16",
    "fp16",
    "sequence_len",
    "learning_rate",
    "lr_scheduler",
    "lr_scheduler_kwargs",
    "cosine_min_lr_ratio",
    "warmup_steps",
    "warmup_ratio",
    "num_epochs",
    "max_steps",
    "optimizer",
    "optim_args",
    "weight_decay",
    "max_grad_norm",
    "seed",
    "curriculum_sampling",
)
# settings of the spin block that change nothing in the result
_HARMLESS = ("save_iterations", "active")


@dataclass
class SpinRun:
    """Everything that is known about a run before the model loads.

    Attributes:
        settings: The `spin` block.
        prompts: Prompts and human answers (`datasets.Dataset` with `prompt_ids`, `chosen_ids`, `row`).
        plan: Rows, steps, learning rates, betas.
        directory: Paths of the artifacts.
        inputs: What the result depends on, as written to `plan.json`.
        tokenizer: The host's.
        sequence_len: The host's, in tokens.
        seed: Of shuffling and, unless `spin.generation.seed` is set, of sampling.
        shuffle: False with the host's `curriculum_sampling`.
        eot_tokens: The host's `eot_tokens`, which end an answer as well.
        command: How the user names this config on the command line.
        adapter: The host's `adapter`, or None for full fine-tuning.
    """

    settings: SpinConfig
    prompts: Any
    plan: Plan
    directory: RunDirectory
    inputs: dict[str, Any]
    tokenizer: Any
    sequence_len: int
    seed: int
    shuffle: bool
    eot_tokens: tuple[str, ...]
    command: str
    adapter: str | None

    @property
    def hash(self) -> str:
        """A hash of what the result depends on; artifacts carry it."""
        return hashlib.sha256(json.dumps(self.inputs, sort_keys=True).encode()).hexdigest()

    def check_directory(self) -> None:
        """Checks that `OUTPUT_DIR/spin` is empty or this run's.

        Raises:
            ValueError: The folder holds another run; names each input that differs, with both values.
        """
        if not self.directory.plan.exists():
            return
        kept = read_json(self.directory.plan)
        if kept.get("hash") == self.hash:
            return
        old = kept.get("inputs", {})
        changes = [
            f"  {key}: {old.get(key)!r} -> {self.inputs.get(key)!r}"
            for key in sorted({*old, *self.inputs})
            if old.get(key) != self.inputs.get(key)
        ]
        raise ValueError(
            f"{self.directory.root} holds a run with other settings:\n" + "\n".join(changes) + "\n"
            "choose another `output_dir`, restore these settings, or delete that folder"
        )

    def write_plan(self) -> None:
        """Writes `plan.json`. Call it on one rank."""
        write_json(self.directory.plan, {"hash": self.hash, **self.plan.to_json(), "inputs": self.inputs})

    def set_aside_after(self, iteration: int) -> list[Path]:
        """Moves iterations beyond the one that a run starts or resumes in out of the way; nothing is deleted.

        Their opponents came from weights that this run is only going to make. The pairs of `iteration` itself stay:
        its opponent is the model that the run starts from. Call it on one rank.

        Returns:
            Where they are now.
        """
        later = [entry.iteration for entry in self.plan.iterations if entry.iteration > iteration]
        found = [self.directory.iteration(index) for index in later if self.directory.iteration(index).exists()]
        if not found:
            return []
        number = 1
        while (replaced := self.directory.root / f"replaced-{number}").exists():
            number += 1
        replaced.mkdir()
        return [path.rename(replaced / path.name) for path in found]


def prepare_run(cfg: Any, train_dataset: Any, tokenizer: Any) -> SpinRun:
    """Makes a run from the host's normalized config and prepared SFT dataset.

    Args:
        cfg: The host's config, with an active `spin` block.
        train_dataset: `datasets.Dataset` with `input_ids` and `labels`.
        tokenizer: The host's.

    Raises:
        ValueError: The data leaves nothing to train on; see `prompt_dataset`.
    """
    settings = spin_config(cfg)
    assert settings is not None
    prompts = prompt_dataset(train_dataset, turns=settings.turns, max_prompts=settings.max_prompts)
    ranks = int(cfg.world_size or 1)
    global_batch = cfg.micro_batch_size * cfg.gradient_accumulation_steps * ranks
    plan = make_plan(
        len(prompts),
        global_batch=global_batch,
        num_epochs=int(cfg.num_epochs),
        history=settings.history,
        betas=settings.betas(),
        learning_rates=settings.learning_rates(float(cfg.learning_rate)),
        max_steps=cfg.max_steps,
        warmup={"warmup_steps": cfg.warmup_steps, "warmup_ratio": cfg.warmup_ratio},
    )
    inputs = {
        "prompts": _content_hash(prompts),
        "global_batch": global_batch,
        **{key: _plain(cfg.get(key)) for key in _HOST_KEYS},
        **{f"spin.{key}": value for key, value in _flat(settings.model_dump()) if key not in _HARMLESS},
    }
    return SpinRun(
        settings=settings,
        prompts=prompts,
        plan=plan,
        directory=RunDirectory(cfg.output_dir),
        inputs=json.loads(json.dumps(inputs)),
        tokenizer=tokenizer,
        sequence_len=int(cfg.sequence_len),
        seed=int(cfg.seed if cfg.seed is not None else 42),
        shuffle=not cfg.curriculum_sampling,
        eot_tokens=tuple(cfg.eot_tokens or ()),
        command=str(cfg.axolotl_config_path or "spin.yml"),
        adapter=cfg.adapter or None,
    )


def _content_hash(prompts: Any) -> str:
    """Hashes prompts and human answers, so that other data, another template or another tokenizer is another run."""
    digest = hashlib.sha256()
    for batch in prompts.with_format("arrow").iter(batch_size=1000):
        for name in ("prompt_ids", "chosen_ids"):
            column = batch[name].combine_chunks()
            digest.update(column.value_lengths().to_numpy().tobytes())
            digest.update(column.flatten().to_numpy().tobytes())
    return digest.hexdigest()


def _flat(block: dict[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in block.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if hasattr(value, "items"):
        return {str(key): _plain(item) for key, item in value.items()}
    return str(value)
