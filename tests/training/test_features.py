"""The host's kernels, adapters and partial training through the host: SPIN's log-probs are the plain model's own.

Each run plays two iterations. Iteration 1's opponent was scored by the model as the host had wrapped it and trained it in
iteration 0; what it saved is loaded without any of that, and gives the same log-probs to one unpadded sequence at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import host
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
from warm import Ranks, Warm

PLAIN_LORA = {**host.LORA, "lora_dropout": 0.0}
KERNELS = {f"lora_{part}_kernel": True for part in ("mlp", "qkv", "o")}
INTERPRET = {"TRITON_INTERPRET": "1"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("features")
    host.config(made, rows=12)
    return made


@pytest.fixture(scope="module")
def interpreting() -> Iterator[Warm]:
    """A warm process whose Triton interprets kernels, which it decides when it is imported."""
    with Warm(host.environment(ACCELERATE_USE_CPU="true", **INTERPRET)) as server:
        yield server


@torch.no_grad()
def plain_logp(model: Any, prompt: list[int], answer: list[int]) -> float:
    """Returns the sum in nats over an answer's tokens, of one sequence by itself."""
    ids = torch.tensor([prompt + answer])
    logps = model(input_ids=ids, use_cache=False).logits[0].log_softmax(-1)
    places = torch.arange(len(prompt) - 1, ids.shape[1] - 1)
    return float(logps[places, ids[0, len(prompt) :]].double().sum())


def farthest(run: host.Run, base: Path, adapter: bool) -> float:
    """Returns how far iteration 1's opponent is from iteration 0's saved model, in nats per token."""
    saved = run.out / "spin" / "iteration-0" / "model"
    model = AutoModelForCausalLM.from_pretrained(base if adapter else saved, dtype=torch.float32)
    model = (PeftModel.from_pretrained(model, saved) if adapter else model).eval()
    return max(
        abs(plain_logp(model, row["prompt_ids"], row[f"{kind}_ids"]) - row[f"opponent_{kind}_logp"])
        / len(row[f"{kind}_ids"])
        for row in run.pairs(1).to_pylist()
        for kind in ("chosen", "rejected")
        if row[f"{kind}_ids"]
    )


def play(
    folder: Path, name: str, by: Warm, *plugins: str, env: dict[str, str] | None = None, **changes: Any
) -> host.Run:
    settings = {"plugins": [*plugins, *host.OURS], "output_dir": str(folder / name), **changes}
    run = host.train(host.config(folder, **settings), by=by, env=env)
    assert [run.metrics(i)["loss_first"] for i in range(2)] == pytest.approx([math.log(2)] * 2, abs=1e-5)
    assert min(run.losses()) < 0.69
    assert "is off by" not in run.output
    assert farthest(run, folder / "model", "adapter" in settings) < 1e-5
    return run


@pytest.mark.host
@pytest.mark.parametrize(
    ("name", "plugins", "changes"),
    [
        ("liger", ["axolotl.integrations.liger.LigerPlugin"], {"liger_fused_linear_cross_entropy": True}),
        ("lora-kernels", [], {**PLAIN_LORA, **KERNELS}),
        ("dora-kernels", [], {**PLAIN_LORA, **KERNELS, "peft_use_dora": True}),
        ("offloading", [], {"gradient_checkpointing": True, "activation_offloading": True}),
        ("lora-offloading", [], {**PLAIN_LORA, "gradient_checkpointing": True, "activation_offloading": True}),
    ],
)
def test_kernels_and_offloading(
    folder: Path, interpreting: Warm, name: str, plugins: list[str], changes: dict[str, Any]
) -> None:
    play(folder, name, interpreting, "on_a_cpu.OnCpuPlugin", *plugins, env=INTERPRET, **changes)


@pytest.mark.host
@pytest.mark.parametrize(
    ("name", "plugins", "changes"),
    [
        ("unfrozen", [], {"unfrozen_parameters": ["model.layers.1.*", "lm_head.*"]}),
        (
            "spectrum",
            ["axolotl.integrations.spectrum.SpectrumPlugin"],
            {"spectrum_top_fraction": 0.5, "spectrum_model_name": "tiny"},
        ),
        ("dora", [], {**host.LORA, "peft_use_dora": True}),
        ("modules", [], {**host.LORA, "lora_modules_to_save": ["embed_tokens", "lm_head"]}),
        ("pissa", [], {**host.LORA, "peft_init_lora_weights": "pissa"}),
        ("olora", [], {**host.LORA, "peft_init_lora_weights": "olora"}),
    ],
)
def test_what_is_trained(folder: Path, warm: Warm, name: str, plugins: list[str], changes: dict[str, Any]) -> None:
    play(folder, name, warm, *plugins, **changes)


@pytest.mark.host
@pytest.mark.once
def test_compiled(folder: Path, warm: Warm) -> None:
    """Answers come from the model as it is; hooks on a compiled model's head are not relied on."""
    run = play(folder, "compiled", warm, torch_compile=True, torch_compile_backend="eager")
    assert "log-probs are taken from the forward's output" in run.output
    assert "the model does not take pairs" not in run.output
    assert "recompile_limit" not in run.output


@pytest.mark.host
@pytest.mark.ranks
@pytest.mark.once
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_compiled_on_two_ranks(kind: str, tmp_path: Path, warm_ranks: Ranks) -> None:
    """The compiled model is what DDP wraps, and FSDP2 has hooks within it."""
    changes = {**host.layout(kind, tmp_path), "torch_compile": True, "torch_compile_backend": "eager"}
    run = host.train(host.config(tmp_path, rows=12, **changes), kind, by=warm_ranks)
    assert [run.metrics(i)["loss_first"] for i in range(2)] == pytest.approx([math.log(2)] * 2, abs=1e-5)
    assert min(run.losses()) < 0.69
    assert farthest(run, tmp_path / "model", adapter=False) < 1e-5
    assert "log-probs are taken from the forward's output" in run.output


@pytest.mark.host
def test_patterns_that_reach_no_adapter_are_refused(folder: Path, warm: Warm) -> None:
    """The host freezes the adapter too, whose names begin otherwise; SFT with recomputation then learns nothing."""
    changes = {**PLAIN_LORA, "unfrozen_parameters": ["^model.layers.*"], "gradient_checkpointing": True}
    run = host.train(host.config(folder, output_dir=str(folder / "untrained"), **changes), by=warm, fails=True)
    assert "nothing of the model is trained: `unfrozen_parameters`" in run.output
    assert not list(run.out.glob("spin/iteration-0/chunks/*"))
