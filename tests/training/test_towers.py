"""Text on models that take images or sound too: towers stay as they are, on one rank or two, with adapters or without."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import architectures
import host
import played
import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from rows import PAIR
from safetensors.torch import load_file
from transformers import AutoProcessor
from warm import Ranks, Warm

from axolotl_spin.training.layouts import PairCollator
from axolotl_spin.training.logprobs import completion_logps
from axolotl_spin.training.towers import freeze_towers

LANGUAGE = r"model.language_model.layers.[\d]+.(mlp|self_attn).(up|down|gate|q|k|v|o)_proj"
VISION = r".*vision_tower.*(q|k|v|out)_proj"


def build(name: str) -> Any:
    if why := architectures.lacking(name):
        pytest.skip(why)
    return architectures.build(name, 47)


@pytest.mark.parametrize(
    ("name", "towers"),
    [
        ("gemma3", ["multi_modal_projector", "vision_tower"]),
        ("gemma4", ["audio_tower", "embed_audio", "embed_vision", "vision_tower"]),
        ("gemma4_unified", ["embed_audio", "embed_vision"]),
        ("llama4", ["multi_modal_projector", "vision_model"]),
        ("mistral3", ["multi_modal_projector", "vision_tower"]),
        ("qwen3_5", ["visual"]),
        ("qwen2_5_vl", ["visual"]),
        ("voxtral", ["audio_tower", "multi_modal_projector"]),
        ("llama", []),
        ("gemma3_text", []),
    ],
)
def test_what_text_reaches_is_trained_and_nothing_else(name: str, towers: list[str]) -> None:
    """By the gradients of a pair's log-probs: what was frozen gets none, or zeros; all the rest gets some."""
    model = build(name)
    batch = PairCollator(0)([PAIR])
    completion_logps(model, batch).sum().backward()
    got = {key for key, weight in model.named_parameters() if weight.grad is not None and weight.grad.any()}
    assert freeze_towers(model) == towers
    trained = {key for key, weight in model.named_parameters() if weight.requires_grad}
    assert got <= trained and bool(towers) == (len(trained) < len(list(model.parameters())))
    assert freeze_towers(model) == []


def test_an_adapter_keeps_to_the_language_model() -> None:
    adapter = get_peft_model(build("gemma3"), LoraConfig(r=2, target_modules="all-linear"))
    assert freeze_towers(adapter) == ["vision_tower"]
    trained = [name for name, weight in adapter.named_parameters() if weight.requires_grad]
    assert trained and all("language_model" in name for name in trained)


def test_an_adapter_beside_the_language_model_alone_is_refused() -> None:
    adapter = get_peft_model(build("gemma3"), LoraConfig(r=2, target_modules=VISION))
    with pytest.raises(ValueError, match=r"lies in vision_tower, which text does not reach: change `lora_target_mod"):
        freeze_towers(adapter)


# -- through the host ---------------------------------------------------------------------------------------------------


def settings(folder: Path, **changes: Any) -> dict[str, Any]:
    architectures.save("gemma3", folder / "model")
    tiny.conversations(folder / "data.jsonl", 12)
    return played.settings_of(folder, **{"sequence_len": 64, **changes})


def tower(folder: Path) -> dict[str, torch.Tensor]:
    weights = load_file(folder / "model.safetensors")
    return {name: weight for name, weight in weights.items() if "vision_tower" in name or "projector" in name}


@pytest.mark.host
def test_a_run_that_goes_on_keeps_class_processor_and_towers(tmp_path: Path, warm: Warm) -> None:
    spin = played.settings_of(tmp_path / "x")["spin"]
    base = settings(tmp_path, save_strategy="epoch")
    first = host.train({**base, "spin": {**spin, "iterations": 1}}, by=warm)
    run = host.train(base, by=warm)
    assert "text does not reach multi_modal_projector, vision_tower: they stay as they are" in first.output
    assert "going on from" in run.output
    assert run.metrics(1)["loss_first"] == pytest.approx(math.log(2), abs=1e-5)
    start = tower(tmp_path / "model")
    for folder in (run.out / "spin" / "iteration-1" / "model", run.out):
        saved = tower(folder)
        assert start.keys() == saved.keys() and all(torch.equal(start[name], saved[name]) for name in start)
        model, wrong = played.loaded("gemma3", folder)
        assert type(model).__name__ == "Gemma3ForConditionalGeneration" and not wrong
        assert (folder / "processor_config.json").read_text() == (
            tmp_path / "model" / "processor_config.json"
        ).read_text()


@pytest.mark.host
def test_the_hosts_pattern_of_target_modules(tmp_path: Path, warm: Warm) -> None:
    lora = {**host.LORA, "lora_target_linear": None, "lora_target_modules": LANGUAGE, "lora_dropout": 0.0}
    run = host.train(settings(tmp_path, **lora), by=warm)
    assert [run.metrics(i)["loss_first"] for i in range(2)] == pytest.approx([math.log(2)] * 2, abs=1e-5)
    adapter = load_file(run.out / "spin" / "iteration-1" / "model" / "adapter_model.safetensors")
    assert len(adapter) == 2 * 2 * 7 and all("language_model.layers" in name for name in adapter)
    assert all(weight.any() for weight in adapter.values())
    assert (run.out / "spin" / "iteration-1" / "model" / "processor_config.json").exists()


@pytest.mark.host
def test_rows_with_images_stop_the_run_before_a_model_loads(tmp_path: Path, warm: Warm) -> None:
    base, path = settings(tmp_path), tmp_path / "model" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "image_token_index": 4}))  # `<|user|>`, in every row
    run = host.train(base, by=warm, fails=True)
    assert "`datasets`: prepared row 0 has '<|user|>', the model's `image_token_i" in run.output
    assert not host.loaded_a_model(run.out)


@pytest.mark.host
@pytest.mark.ranks
def test_no_rank_waits_for_a_towers_gradient(tmp_path: Path, warm_ranks: Ranks) -> None:
    """DDP looks for parameters without one only where nothing is recomputed (`find_unused_parameters`)."""
    changes = {**host.layout("ddp", tmp_path), "gradient_checkpointing": True, "ddp_find_unused_parameters": False}
    run = host.train(settings(tmp_path, **changes), "ddp", by=warm_ranks)
    assert [run.metrics(i)["loss_first"] for i in range(2)] == pytest.approx([math.log(2)] * 2, abs=1e-5)
    assert run.metrics(1)["spin/updated_weights"] > 0.5


@pytest.mark.host
@pytest.mark.ranks
@pytest.mark.once
@pytest.mark.parametrize("kind", ["zero3", "fsdp2"])
def test_sharded_over_two_ranks(kind: str, tmp_path: Path, warm_ranks: Ranks) -> None:
    """Each opponent's log-probs are those of one process with the model that was saved whole.

    Files are compared as they load: ZeRO-3's name the tower as older transformers did, and FSDP2's have a tied head twice.
    """
    changes = {**host.layout(kind, tmp_path), "gradient_accumulation_steps": 2, "weight_decay": 0.1}
    if kind == "fsdp2":
        changes["fsdp_config"] = {**changes["fsdp_config"], "transformer_layer_cls_to_wrap": "Gemma3DecoderLayer"}
    run = host.train(settings(tmp_path, **changes), kind, by=warm_ranks)
    assert [run.metrics(i)["loss_first"] for i in range(2)] == pytest.approx([math.log(2)] * 2, abs=1e-5)
    assert run.metrics(1)["spin/updated_weights"] > 0.5
    folders = [tmp_path / "model", *(run.out / "spin" / f"iteration-{i}" / "model" for i in range(2)), run.out]
    models, wrong = zip(*(played.loaded("gemma3", folder) for folder in folders), strict=True)
    assert not any(wrong)
    for iteration in range(2):
        assert max(played.off_alone(models[iteration], row) for row in run.pairs(iteration).to_pylist()) < 1e-5
    for model, folder in zip(models[1:], folders[1:], strict=True):
        for name, weight in models[0].state_dict().items():
            if "vision_tower" in name or "projector" in name:
                assert torch.equal(weight, model.state_dict()[name])
        assert type(AutoProcessor.from_pretrained(folder)).__name__ == "LlavaProcessor"
