"""Where the pieces of `make test-gpu` run: the device is chosen by the machine, and so is how large they are."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import host
import tiny
import torch
from warm import Ranks, Warm

PLUGINS = ["axolotl_spin.SpinPlugin"]
# 250 million parameters with a vocabulary of 32,007; the tests' own model where there is no GPU
LARGE = {
    "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 16, "num_attention_heads": 16,
    "num_key_value_heads": 8, "max_position_embeddings": 4096, "initializer_range": 0.02,
}  # fmt: skip
WORDS = 32_000


@dataclass
class Machine:
    """A machine, with GPUs or without.

    Attributes:
        gpus: How many there are.
        forks: Where there is none, what starts a run in a second: on one rank, and on two.
        seconds: After which a run counts as hung.
    """

    gpus: int
    forks: tuple[Warm, Ranks | None] | None = None
    seconds: int = 300

    @property
    def device(self) -> torch.device:
        return torch.device("cuda" if self.gpus else "cpu")

    @classmethod
    def here(cls) -> Machine:
        """Returns the machine that this runs on."""
        return cls(torch.cuda.device_count())

    @property
    def vocabulary(self) -> int:
        return len(tiny.SPECIAL) + self.sized(len(tiny.WORDS), WORDS)

    def sized(self, small: Any, large: Any) -> Any:
        """Returns the one for a machine without a GPU, or the one for a machine with one."""
        return large if self.gpus else small

    def prepare(self, folder: Path, rows: int) -> None:
        """Makes a model with random weights and its tokenizer, which all pieces share, and so many conversations."""
        words = [f"w{number}" for number in range(self.sized(len(tiny.WORDS), WORDS))]
        shared, aside = folder.parent / "model", folder.parent / "model-made"
        if not shared.exists():
            self.model().save_pretrained(aside)
            tiny.tokenizer(words).save_pretrained(aside)
            aside.rename(shared)
        if not (folder / "model").exists():
            (folder / "model").symlink_to(shared)
        draw, longest = random.Random(0), self.sized(8, 128)
        with open(folder / "data.jsonl", "w", encoding="utf-8") as file:
            for _ in range(rows):
                texts = (" ".join(draw.choices(words, k=draw.randint(longest // 2, longest))) for _ in range(2))
                roles = zip(("user", "assistant"), texts, strict=True)
                file.write(json.dumps({"messages": [{"role": role, "content": text} for role, text in roles]}) + "\n")

    def model(self, **changes: Any) -> Any:
        """Returns the model, on the device, in fp32."""
        with self.device:
            return tiny.model(self.vocabulary, **self.sized({}, LARGE), **changes)

    def settings(self, folder: Path, rows: int = 0, plugins: Sequence[str] = (), **changes: Any) -> dict[str, Any]:
        """Returns the config of a run in bf16: two iterations, large enough for a GPU to show something, or tiny.

        Args:
            folder: Of the piece; model and data are made there.
            rows: Of the data; by default as many as suit the machine.
            plugins: Ahead of SPIN's; without a GPU, half precision is one.
            changes: Of the config.
        """
        self.prepare(folder, rows or self.sized(12, 128))
        base: dict[str, Any] = {
            "plugins": [*plugins, *self.sized(["half.HalfPlugin"], []), *PLUGINS],
            **self.sized({"bfloat16": True}, {"bf16": True}),
            "spin": {"iterations": 2, "generation": self.answers()},
            "sequence_len": self.sized(64, 512),
            "micro_batch_size": self.sized(2, 8),
            "gradient_accumulation_steps": 2,
            "learning_rate": self.sized(1e-3, 1e-4),
            "save_total_limit": 1,
        }
        return host.config(folder, **{**base, **changes})

    def answers(self) -> dict[str, Any]:
        """Returns `spin.generation`."""
        return self.sized({"max_new_tokens": 10, "batch_size": 8}, {"max_new_tokens": 128, "batch_size": 64})

    def adapter(self) -> dict[str, Any]:
        """Returns LoRA's keys; the host's fused kernels for it, which need a GPU, are as it chooses where there is one."""
        kernels = self.sized({name: value for name, value in host.LORA.items() if name.endswith("_kernel")}, {})
        keys = {"adapter": "lora", "lora_r": 8, "lora_alpha": 16, "lora_dropout": 0.0, "lora_target_linear": True}
        return {"learning_rate": 1e-3, **keys, **kernels}

    def sharded(self, kind: str, folder: Path) -> dict[str, Any]:  # two ranks: of layouts over several
        """Returns the changes of a layout over several ranks; see `host.layout`."""
        changes = host.layout(kind, folder)
        if "deepspeed" in changes:
            path = Path(changes["deepspeed"])
            path.write_text(json.dumps({**json.loads(path.read_text()), "bf16": {"enabled": True}}))
        del changes["plugins"], changes["output_dir"]
        return changes

    def train(
        self, settings: dict[str, Any], kind: str = "single", env: dict[str, str] | None = None, fails: bool = False
    ) -> host.Run:
        """Trains by the host's command.

        Args:
            settings: The config.
            kind: Of the launch: `single`, or a layout over all GPUs (over two ranks where there is none).
            env: More environment variables.
            fails: The run is expected to fail.
        """
        if self.forks:
            warm, ranks = self.forks
            return host.train(settings, kind, env, fails, by=warm if kind == "single" else ranks)
        several = f"-m torch.distributed.run --nproc_per_node {self.gpus or 2} --rdzv-backend c10d"
        launcher = [] if kind == "single" else f"{several} --rdzv-endpoint localhost:0".split()
        own = {**self.environment(kind), **(env or {})}
        run = host.start(settings, *launcher, "-m", "axolotl.cli.train", "{config}", env=own, timeout=self.seconds)
        assert (run.code != 0) == fails, run.output[-4000:]
        return run

    def plan(self, settings: dict[str, Any]) -> dict[str, Any]:
        """Returns what `axolotl spin plan` says of a config."""
        if self.forks:
            path = host.write(settings)
            arguments = ("axolotl_spin", "plan", str(path), "--json")
            _, output = self.forks[0].run(*arguments, env=host.environment(**self.environment()), cwd=path.parent)
        else:
            output = host.start(
                settings, "-m", "axolotl_spin", "plan", "{config}", "--json", env=self.environment()
            ).output
        return json.JSONDecoder().raw_decode(output, output.rindex("\n{\n") + 1)[0]

    def ready(self) -> None:
        """Waits for all that a GPU has been asked for, and makes what it holds now its peak."""
        if self.gpus:
            torch.cuda.synchronize()  # GPU only: a CPU has done what it was asked for
            torch.cuda.reset_peak_memory_stats()  # GPU only: there is no such figure of a CPU

    def peak(self) -> dict[str, float]:
        """Returns the most that a GPU has held since it was `ready`, as a figure."""
        if not self.gpus:
            return {}
        return {"peak, GiB": round(torch.cuda.max_memory_allocated() / 2**30, 3)}  # GPU only: the same

    def environment(self, kind: str = "single") -> dict[str, str]:
        """Returns the variables by which a launch takes its device: one process one GPU."""
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
        on_gpu = {"CUDA_VISIBLE_DEVICES": visible} if kind == "single" else {}
        on_cpu = {"ACCELERATE_USE_CPU": "true"} if kind == "single" else host.rank_environment(kind)
        return self.sized(on_cpu, on_gpu)
