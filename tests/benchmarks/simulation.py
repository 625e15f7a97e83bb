"""Peak memory and step time of large models on many GPUs, without one.

    python tests/benchmarks/simulation.py [--json FILE] [--only WORD]

A training step of ours runs on tensors that have a shape and no storage (`FakeTensorMode`), as one rank of a process group
that communicates with nobody, sharded by FSDP2 as the host shards. PyTorch's own tracker (`FSDPMemTracker`) follows every
storage. `docs/tuning.md` has the figures, made of the file beside this one, and what they leave out.

All layers are simulated: which moment of a step is the highest may depend on their number.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from axolotl_spin.training.layouts import PairCollator
from axolotl_spin.training.step import pair_losses

FIGURES = Path(__file__).with_suffix(".json")
SHAPES: dict[str, dict[str, int]] = {
    "Llama 3.1 8B": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256,
    },
    "Llama 3.1 70B": {
        "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
        "num_key_value_heads": 8, "vocab_size": 128256,
    },
}  # fmt: skip
# what a rank holds of the pairs: sequences of 2048 tokens with one prompt for both answers
PROMPT, ANSWER = 512, 768
LORA = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

# H100 SXM by NVIDIA's data sheet: dense bf16, and what a GPU receives at most. A node has 8, and a 400 Gb/s port for each
PEAK_FLOPS, NVLINK, PORT, NODE = 989e12, 450e9, 50e9, 8
# what is taken to be reached of it
REACHED_FLOPS, REACHED_LINK = 0.5, 0.8


@dataclass(frozen=True)
class Case:
    """What is simulated.

    Attributes:
        model: One of `SHAPES`.
        ranks: GPUs, over which everything is sharded.
        pairs: In a micro-batch of a rank.
        adapter: Whether LoRA is trained on a frozen model, or the model itself.
        checkpointing: Of activations, one decoder layer at a time.
        accumulation: Micro-batches in a step.
    """

    model: str
    ranks: int
    pairs: int = 2
    adapter: bool = False
    checkpointing: bool = True
    accumulation: int = 1


CASES = [
    *(Case("Llama 3.1 8B", count) for count in (8, 16, 64)),
    Case("Llama 3.1 8B", 8, accumulation=2),
    Case("Llama 3.1 8B", 8, checkpointing=False),
    Case("Llama 3.1 8B", 8, adapter=True),
    Case("Llama 3.1 70B", 64),
    *(Case("Llama 3.1 70B", count, adapter=True) for count in (64, 8, 16)),
]


@dataclass(frozen=True)
class Step:
    """What a step takes of one rank.

    Attributes:
        peak: Bytes at its highest moment, all categories together.
        parts: The same by the tracker's categories.
        flops: Of matrix products, recomputation included, attention's own left out.
        traffic: Bytes of the tensors that collectives gather or reduce.
    """

    peak: float
    parts: dict[str, float]
    flops: float
    traffic: float


class _Known(TorchDispatchMode):
    """Answers what depends on values, which fake tensors have not: the longest answer, and how many targets a tile has."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return ANSWER
        if func is torch.ops.aten.nonzero.default:
            return torch.empty(ANSWER, 1, dtype=torch.int64)
        return func(*args, **(kwargs or {}))


class _Traffic(TorchDispatchMode):
    """Adds up the bytes of what collectives gather or reduce."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.c10d._allgather_base_.default:
            self.bytes += args[0].numel() * args[0].element_size()
        elif func is torch.ops.c10d._reduce_scatter_base_.default:
            self.bytes += args[1].numel() * args[1].element_size()
        return func(*args, **(kwargs or {}))


class _Tracker(FSDPMemTracker):
    """Follows the peak of the whole alone: each module's takes time that grows with the square of their number."""

    def _update_peak_stats(self, peak_state: Any) -> None:
        for device, now in self._curr_mem_snap.items():
            if self._peak_mem.get(device, 0) < now["Total"]:
                self._peak_mem[device], self._peak_mem_snap[device] = now["Total"], dict(now)


@contextmanager
def ranks(count: int) -> Iterator[Any]:
    """Yields the device mesh of a process group of which this process is the first rank, and the others do not exist."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=count)
    try:
        yield dist.device_mesh.init_device_mesh("cpu", (count,))
    finally:
        dist.destroy_process_group()


def _built(config: LlamaConfig, case: Case) -> tuple[torch.nn.Module, list[torch.nn.Module]]:
    """Returns the model in bf16, with its adapter in fp32, and its decoder layers."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        model: Any = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(torch.float32)
    layers = list(model.model.layers)
    if case.adapter:
        model = get_peft_model(model, LoraConfig(**LORA, target_modules=TARGETS))
    return model, layers


def _empty(config: LlamaConfig, case: Case) -> tuple[torch.nn.Module, list[torch.nn.Module]]:
    """Returns the same of fake tensors; PEFT moves what it makes, which those cannot be."""
    with unset_fake_temporarily(), torch.device("meta"):
        model, layers = _built(config, case)
    for part in model.modules():
        for name, weight in part.named_parameters(recurse=False):
            made = torch.empty(weight.shape, dtype=weight.dtype)
            part.register_parameter(name, torch.nn.Parameter(made, requires_grad=weight.requires_grad))
        for name, buffer in part.named_buffers(recurse=False):
            setattr(part, name, torch.empty(buffer.shape, dtype=buffer.dtype))
    return model, layers


def _sharded(config: LlamaConfig, case: Case, mesh: Any, real: bool) -> torch.nn.Module:
    """Returns the model as the host prepares it for FSDP2 with `bf16: true`: see `fsdp2_prepare_model` there."""
    model, layers = (_built if real else _empty)(config, case)
    if case.checkpointing:
        wrap = functools.partial(checkpoint_wrapper, checkpoint_impl=CheckpointImpl.NO_REENTRANT)
        apply_activation_checkpointing(model, checkpoint_wrapper_fn=wrap, check_fn=lambda part: part in layers)
    half = MixedPrecisionPolicy(torch.bfloat16, torch.bfloat16, torch.bfloat16)
    shard: Callable[[Any], Any] = functools.partial(fully_shard, mesh=mesh, reshard_after_forward=True, mp_policy=half)
    for layer in layers:
        for part in layer.modules():
            if isinstance(part, LoraLayer):
                shard(part.lora_A["default"])
                shard(part.lora_B["default"])
        shard(layer)
    shard(model)
    return model.train()


def _batch(pairs: int, hidden_size: int) -> dict[str, torch.Tensor]:
    row = {
        "prompt_ids": [1] * PROMPT,
        "chosen_ids": [1] * ANSWER,
        "rejected_ids": [2] * ANSWER,
        "opponent_chosen_logp": -3.0,
        "opponent_rejected_logp": -4.0,
    }
    collator = PairCollator(0, "shared", hidden_size)
    collator.in_parts = False  # lengths are values, which fake tensors have not; a mask takes little beside the rest
    return collator([row] * pairs)


def simulate(case: Case, shape: dict[str, int], *, real: bool = False) -> Step:
    """Runs two training steps as one rank, counts the first and tracks the second, when the optimizer has its state.

    Args:
        case: What is simulated; its `model` is not looked at.
        shape: Of the Llama.
        real: Computes with real tensors, which needs all that memory, instead of fake ones.
    """
    config = LlamaConfig(**shape, max_position_embeddings=8192, attn_implementation="sdpa", use_cache=False)
    batch = _batch(case.pairs, config.hidden_size)
    with ranks(case.ranks) as mesh, nullcontext() if real else FakeTensorMode() as fake:
        model: Any = _sharded(config, case, mesh, real)
        trained = [weight for weight in model.parameters() if weight.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-6, fused=True)
        if fake is not None:
            batch = {name: fake.from_tensor(value) for name, value in batch.items()}
        tracker, traffic, counter = _Tracker(model, optimizer), _Traffic(), FlopCounterMode(display=False)
        tracker.track_inputs(tuple(batch.values()))
        known = nullcontext() if real else _Known()

        def step() -> None:
            for turn in range(case.accumulation):
                model.set_requires_gradient_sync(turn == case.accumulation - 1)  # as accelerate does
                found = pair_losses(
                    model,
                    batch,
                    beta=0.1,
                    loss_type="sigmoid",
                    sft_weight=0.0,
                    length_normalized=False,
                    in_head=True,
                )
                (found.losses.mean() / case.accumulation).backward()
                del found
                tracker.reset_mod_stats()  # it takes a forward pass as the first one
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()

        # the counter takes apart operations that it has no formula for, whose parts would be tracked
        with counter, known:
            step()
        with tracker, traffic, known:
            step()
        [peak] = tracker.get_tracker_snapshot("peak").values()
    parts = {str(getattr(kind, "value", kind)): float(count) for kind, count in peak.items() if count}
    total = parts.pop("Total")
    return Step(total, parts, float(counter.get_total_flops()), float(traffic.bytes))


def seconds(step: Step, count: int) -> dict[str, float]:
    """Returns how long a step takes at the least: as long as its products or its collectives, whichever is longer.

    Args:
        step: Of one rank.
        count: Ranks, eight to a node.
    """
    link = NVLINK if count <= NODE else PORT
    compute = step.flops / (PEAK_FLOPS * REACHED_FLOPS)
    network = step.traffic * (count - 1) / count / (link * REACHED_LINK)
    return {"compute": compute, "network": network, "step": max(compute, network)}


def measure(case: Case) -> dict[str, Any]:
    """Simulates a case, as plain JSON: the case, `step` and `seconds`."""
    step = simulate(case, SHAPES[case.model])
    return {"case": asdict(case), "step": asdict(step), "seconds": seconds(step, case.ranks)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", type=Path, default=FIGURES, help="the file of figures")
    parser.add_argument("--only", default="", help="cases whose name has this word; the others stay as they are")
    given = parser.parse_args()
    kept = json.loads(given.json.read_text())["figures"] if given.json.exists() else []
    known = {json.dumps(entry["case"], sort_keys=True): entry for entry in kept}
    for case in CASES:
        key = json.dumps(asdict(case), sort_keys=True)
        if given.only in key:
            known[key] = measure(case)
            print(key, f"{known[key]['step']['peak'] / 2**30:.2f} GiB", flush=True)
        names = [json.dumps(asdict(each), sort_keys=True) for each in CASES]
        about = {"torch": torch.__version__, "prompt": PROMPT, "answer": ANSWER}
        found = {**about, "figures": [known[name] for name in names if name in known]}
        given.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
