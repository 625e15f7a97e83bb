"""What `make test-gpu` runs, piece by piece: each is the suite's own code on the device that the machine has.

Without a GPU every piece runs small, on the CPU, but for those that only a GPU can do. What they measure there says nothing
about speed; that they run shows that their code does. A line that only a GPU can run ends in a comment that says why.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import host
import numpy as np
import recovery
import torch
import workload
from machine import Machine
from torch import Tensor

from axolotl_spin.training.layouts import PairCollator
from axolotl_spin.training.step import pair_losses

Figures = dict[str, Any]
# the first loss of an iteration in bf16, where policy and opponent are computed alike
_EXACT = 1e-3
_LAYOUT = re.compile(r"pairs are laid out (\w+): ")
_MOVED = re.compile(r"([\d.]+) GiB of training moved to the CPU")


class Piece(NamedTuple):
    """A part of the whole.

    Attributes:
        name: For people.
        play: Does it, in a folder of its own, and returns its figures by their names; raises where something is wrong.
        lacks: Returns what the machine lacks for it, or nothing.
        several: Whether it takes several ranks.
    """

    name: str
    play: Callable[[Machine, Path], Figures]
    lacks: Callable[[Machine], str] = lambda _: ""
    several: bool = False


# -- runs through the host ----------------------------------------------------------------------------------------------


def sound(run: host.Run, iterations: int = 2) -> Figures:
    """Returns the figures of a run, once it is known to be right."""
    firsts = [run.metrics(iteration)["loss_first"] for iteration in range(iterations)]
    assert all(abs(first - math.log(2)) < _EXACT for first in firsts), f"policy and opponent do not agree: {firsts}"
    assert "is off by" not in run.output, run.output[-4000:]
    losses, last = run.losses(), run.metrics(iterations - 1)
    assert min(losses) < math.log(2) - 0.001, f"nothing was learnt: {losses}"
    assert list(run.out.glob("*.safetensors")), "no model was saved"
    gib = [value for row in run.logs() for name, value in row.items() if name.startswith("memory/max_alloc")]
    pairs = run.pairs(iterations - 1).num_rows
    return {
        "first losses": [round(first, 6) for first in firsts],
        "last loss": round(losses[-1], 4),
        "layout": (_LAYOUT.findall(run.output) or [""])[0],
        "weights that a step moved": round(last["spin/updated_weights"], 4),
        "answers, tokens/s": round(last["spin/generation_tokens_per_second"]),
        "scored, pairs/s": round(pairs / last["spin/scoring_seconds"], 1),
        "trained, pairs/s": round(pairs / last["spin/training_seconds"], 1),
        "peak, GiB": max(gib, default=None),
    }


def trained(lora: bool = False, kind: str = "single", **changes: Any) -> Callable[[Machine, Path], Figures]:
    """Returns a piece that trains for two iterations.

    Args:
        lora: Whether it has an adapter.
        kind: A layout over several ranks.
        changes: Of the config.
    """

    def play(machine: Machine, folder: Path) -> Figures:
        plugins: list[str] = []
        more = dict(changes)
        if kind != "single":
            more |= machine.sharded(kind, folder)  # two ranks: of layouts over several
            plugins = machine.sized(["cpu_cluster.CpuClusterPlugin"], [])  # two ranks: the same
        if lora:
            more = {**machine.adapter(), **more}
        return sound(machine.train(machine.settings(folder, plugins=plugins, **more), kind))

    return play


def vllm(adapter: bool, offload: bool) -> Callable[[Machine, Path], Figures]:
    """Returns a piece whose answers come from vLLM on the GPU that trains; elsewhere the tests' engine stands for it."""

    def play(machine: Machine, folder: Path) -> Figures:
        python = os.environ.get("SPIN_VLLM_PYTHON") or sys.executable
        engine = {"python": machine.sized(sys.executable, python), "offload": offload, "enforce_eager": True}
        generation = {**machine.answers(), "backend": "vllm", "vllm": engine}
        iterations = 1 if adapter else 2  # the second engine serves what the first iteration has left on disk
        changes = {
            **(machine.adapter() if adapter else {}),
            "spin": {"iterations": iterations, "generation": generation},
        }
        pretended = os.pathsep.join([str(host.TESTS / "fake_vllm"), host.environment()["PYTHONPATH"]])
        run = machine.train(machine.settings(folder, **changes), env=machine.sized({"PYTHONPATH": pretended}, {}))
        moved = [float(gib) for gib in _MOVED.findall(run.output)]
        assert len(moved) == iterations * offload and all(gib > machine.sized(-1, 0) for gib in moved), moved
        starts = [run.metrics(iteration)["spin/engine_start_seconds"] for iteration in range(iterations)]
        apart = {"engine starts, s": [round(seconds, 1) for seconds in starts], "moved to the CPU, GiB": moved}
        return {**sound(run, iterations), **apart}

    return play


def killed(machine: Machine, folder: Path) -> Figures:
    """A run that is killed with SIGKILL in its second iteration, and goes on, beside one that is left alone."""
    changes = {name: value for name, value in recovery.CHANGES.items() if name != "plugins"}
    settings = machine.settings(folder, rows=19, plugins=["faults.FaultPlugin"], **changes)
    expected = recovery.outcome(machine.train(settings).out)
    shutil.rmtree(settings["output_dir"])
    machine.train(settings, env={"SPIN_KILL": "iteration 1/first epoch", "SPIN_KILL_RANK": "0"}, fails=True)
    resumed = machine.train(settings)
    assert "going on from" in resumed.output, resumed.output[-4000:]
    found = recovery.outcome(resumed.out)
    differs = recovery.differences(found, expected)
    weights = zip(found["weights"].values(), expected["weights"].values(), strict=True)
    off = max((one.double() - other.double()).abs().max().item() for one, other in weights)
    # kernels of a GPU may add in another order each time
    assert machine.gpus or not differs, differs
    assert off <= 0.05, f"weights are off by {off}"
    return {"differs from the run left alone in": differs, "weights are off by": off}


# seconds: a collective's time-out, and how long a rank is waited for; without a GPU and with
_TIMEOUT, _WAIT = (5, 30), (7, 45)


def waited(machine: Machine, folder: Path) -> Figures:  # two ranks: one waits for the other
    """The last rank answers for longer than a collective may take, and the others wait for it."""
    timeout, wait = machine.sized(*_TIMEOUT), machine.sized(*_WAIT)
    plugins = ["dawdle.DawdlePlugin", *machine.sized(["cpu_cluster.CpuClusterPlugin"], [])]
    changes = {**machine.sharded("ddp", folder), "ddp_timeout": timeout}
    run = machine.train(machine.settings(folder, plugins=plugins, **changes), "ddp", env={"DAWDLE": str(wait)})
    seconds = run.metrics(0)["spin/generation_seconds"]
    assert seconds > wait > timeout
    return {**sound(run), "a collective's time-out, s": timeout, "answering, s": round(seconds, 1)}


# -- beside others ------------------------------------------------------------------------------------------------------


def planned(machine: Machine, folder: Path) -> Figures:
    """The peak of a training step beside what `axolotl spin plan` says before anything is loaded."""
    settings = machine.settings(folder, plugins=["bench_plugin.BenchPlugin"])
    estimate = machine.plan(settings)["memory"]["training"]
    result = folder / "probe.json"
    machine.train(settings, env={"BENCH_RESULT": str(result)})
    peak = json.loads(result.read_text())["peak_bytes"]
    gib = {"estimate, GiB": estimate / 2**30, "peak, GiB": peak / 2**30}
    return {**{name: round(value, 3) for name, value in gib.items()}, "peak / estimate": round(peak / estimate, 3)}


def beside_trl(machine: Machine, folder: Path) -> Figures:
    """Training on ready pairs, beside TRL's `DPOTrainer` on the very token ids (see `tests/benchmarks/training.py`)."""
    batch, steps = machine.sized((2, 3), (16, 6))
    spin = {"iterations": 1, "save_iterations": False, "max_prompts": batch * steps, "generation": machine.answers()}
    changes = {"micro_batch_size": batch, "gradient_accumulation_steps": 1, "optimizer": "adamw_torch_fused"}
    changes |= {"learning_rate": workload.LEARNING_RATE, "lr_scheduler": "constant", "warmup_steps": 0}
    changes |= {"save_strategy": "no", "logging_steps": 1000}
    plugins = ["bench_plugin.BenchPlugin"]
    settings = machine.settings(folder, rows=batch * steps, plugins=plugins, spin=spin, **changes)
    machine.train(settings, env={"BENCH_STOP": "pairs"})
    out, ready = Path(settings["output_dir"]), folder / "ready"
    out.rename(ready)
    found, result = {}, folder / "result.json"
    for layout in ("shared", "packed"):
        shutil.copytree(ready, out)
        machine.train(settings, env={"BENCH_LAYOUT": layout, "BENCH_RESULT": str(result)})
        found[f"SPIN, {layout}"] = json.loads(result.read_text())
        shutil.rmtree(out)
    python = os.environ.get("SPIN_RIVAL_PYTHON") or sys.executable
    rival = [str(host.TESTS / "benchmarks" / "rival.py"), str(ready / "spin" / "iteration-0" / "pairs.parquet")]
    command = [*rival, settings["base_model"], str(batch)]
    theirs = workload.measured(command, result, python=python, **machine.environment())
    found[f"TRL {theirs['versions']['trl']}"] = theirs
    figures: Figures = {"pairs in a step": batch}
    for name, run in found.items():
        figures[f"{name}, pairs/s"] = round(batch / run["step_seconds"], 2)
        figures[f"{name}, peak, GiB"] = round(run["peak_bytes"] / 2**30, 3)
    return figures


# -- on the device itself -----------------------------------------------------------------------------------------------

# nats per token, and of the gradient's length: in fp32, and in bf16
_OFF = {torch.float32: (1e-3, 1e-2), torch.bfloat16: (0.1, 0.3)}
_TIMED = 4  # steps, the first of which is not counted


class Way(NamedTuple):
    """How pairs are laid out and attended to."""

    attention: str
    layout: Any
    in_parts: Any = False
    half: bool = False


PADDED = Way("sdpa", "padded")
SDPA = [Way("sdpa", "packed"), Way("sdpa", "shared"), Way("sdpa", "shared", "always"), Way("eager", "shared")]


def layouts(*ways: Way) -> Callable[[Machine, Path], Figures]:
    """Returns a piece that compares log-probs and gradients with those of padded rows, and takes the time of a step."""

    def play(machine: Machine, folder: Path) -> Figures:
        pairs = pairs_of(machine)
        figures: Figures = {}
        for kind, (most, of_gradient) in _OFF.items():
            step = Step(machine, PADDED, kind, pairs)
            expected, gradient = step.taken()
            figures[f"sdpa, padded, {kind}"] = {"off, nats/token": 0.0, "gradient off by": 0.0, **step.cost()}
            for way in ways:
                if way.half and kind == torch.float32:
                    continue  # GPU only: flash attention takes half precision alone
                step = Step(machine, way, kind, pairs)
                logps, own = step.taken()
                off = ((logps - expected).abs() / step.lengths).max().item()
                turned = ((own - gradient).norm() / gradient.norm()).item()
                assert off < most and turned < of_gradient, f"{way} in {kind}: {off} nats a token, gradient {turned}"
                name = f"{way.attention}, {way.layout}{', in parts' if way.in_parts else ''}, {kind}"
                figures[name] = {"off, nats/token": off, "gradient off by": turned, **step.cost()}
        return {name.replace("torch.", ""): row for name, row in figures.items()}

    return play


class Step:
    """Steps of training on pairs, without an optimizer.

    Args:
        machine: Where.
        way: Layout and attention.
        kind: Of the weights.
        pairs: As a collator takes them.
    """

    def __init__(self, machine: Machine, way: Way, kind: torch.dtype, pairs: list[dict[str, Any]]):
        self.machine, self.pairs = machine, len(pairs)
        self.model = machine.model(attn_implementation=way.attention).to(kind)
        collator = PairCollator(0, way.layout, hidden_size=self.model.config.hidden_size)
        collator.in_parts = way.in_parts
        self.batch = {name: tensor.to(machine.device) for name, tensor in collator(pairs).items()}
        self.lengths = self.batch["completion_lengths"].cpu()

    def once(self) -> Tensor:
        """Takes a forward and a backward pass; returns the log-probs."""
        self.model.zero_grad()
        how: dict[str, Any] = {"beta": 0.1, "loss_type": "sigmoid", "sft_weight": 0.0, "length_normalized": False}
        found = pair_losses(self.model, self.batch, in_head=True, **how)
        found.losses.sum().backward()
        return found.logps.detach()

    def taken(self) -> tuple[Tensor, Tensor]:
        """Returns the log-probs, and all gradients as one vector, both on the CPU."""
        logps = self.once().cpu()
        gradients = [weight.grad.flatten().cpu() for weight in self.model.parameters() if weight.grad is not None]
        return logps, torch.cat(gradients).float()

    def cost(self) -> Figures:
        """Returns speed, and on a GPU the peak of its memory."""
        seconds = []
        for _ in range(_TIMED):
            self.machine.ready()
            begun = time.perf_counter()
            self.once()
            peak = self.machine.peak()
            self.machine.ready()
            seconds.append(time.perf_counter() - begun)
        return {"pairs/s": round(self.pairs / median(seconds[1:]), 1), **peak}


def pairs_of(machine: Machine) -> list[dict[str, Any]]:
    """Returns pairs of random ids, on a GPU about as long as people's are."""
    draw, (low, high) = np.random.default_rng(0), machine.sized((3, 9), (64, 256))
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    logps = {"opponent_chosen_logp": -20.0, "opponent_rejected_logp": -20.0}
    return [
        {**{name: draw.integers(7, machine.vocabulary, draw.integers(low, high)) for name in names}, **logps}
        for _ in range(machine.sized(4, 16))
    ]


# -- all of them --------------------------------------------------------------------------------------------------------

FLASH = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}


def lacks_gpu(machine: Machine) -> str:
    return "" if machine.gpus else "there is no GPU"


def lacks_module(name: str) -> Callable[[Machine], str]:
    """Returns a question whether a package that only a GPU can use is there."""

    def lacks(machine: Machine) -> str:
        return lacks_gpu(machine) or ("" if importlib.util.find_spec(name) else f"`{name}` is not installed")

    return lacks


def lacks_vllm(machine: Machine) -> str:
    there = not machine.gpus or os.environ.get("SPIN_VLLM_PYTHON") or importlib.util.find_spec("vllm")
    return "" if there else "SPIN_VLLM_PYTHON names no Python that has vLLM"


def lacks_several(machine: Machine) -> str:
    return "there is one GPU" if machine.gpus == 1 else ""


QLORA = {"load_in_4bit": True, "adapter": "qlora"}
PIECES = [
    Piece("bf16, all weights", trained()),
    Piece("bf16, LoRA", trained(lora=True)),
    Piece("bf16, QLoRA", trained(lora=True, **QLORA)),
    Piece("bf16, AdamW of 8 bits by torchao", trained(optimizer="adamw_torch_8bit")),
    Piece("bf16, AdamW of 8 bits by bitsandbytes", trained(optimizer="adamw_bnb_8bit"), lacks_gpu),
    Piece("layouts", layouts(*SDPA)),
    Piece("resume after kill -9", killed),
    Piece("memory beside the plan's estimate", planned),
    *(Piece(name.replace("_", " "), trained(attn_implementation=name), lacks_module(module))
      for name, module in FLASH.items()),
    *(Piece(f"layouts, {name.replace('_', ' ')}", layouts(Way(name, "padded", half=True), Way(name, "packed", half=True)),
            lacks_module(module)) for name, module in FLASH.items()),
    Piece("flex attention", trained(attn_implementation="flex_attention"), lacks_gpu),
    Piece("layouts, flex attention", layouts(Way("flex_attention", "shared")), lacks_gpu),
    Piece("vLLM beside training", vllm(adapter=False, offload=False), lacks_vllm),
    Piece("vLLM serves LoRA, training offloaded", vllm(adapter=True, offload=True), lacks_vllm),
    Piece("pairs per second beside TRL", beside_trl),
    Piece("ZeRO-3", trained(kind="zero3"), lacks_several, several=True),
    Piece("FSDP2", trained(kind="fsdp2"), lacks_several, several=True),
    Piece("one rank answers for long", waited, lacks_several, several=True),
]  # fmt: skip
