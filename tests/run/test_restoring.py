"""Models that are saved under other names, or in other shapes, than they have in memory go on with what was saved."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import architectures
import host
import pytest
import tiny
import torch
import yaml
from recovery import differences, outcome, settings_in
from safetensors.torch import load_file, save_file
from warm import Warm

from axolotl_spin.disk.atomic import DamagedFileError
from axolotl_spin.run.restoring import restore, saved_as_in_memory, saved_shapes

# towers under other names, and experts that are one tensor in memory
CONVERTED = ["gemma3", "qwen2_5_vl", "mixtral", "qwen3_moe"]
# a tensor on disk, and what is said to be missing without it: names in memory as far as the library tells them
NEEDED = {
    "gemma3": ("language_model.model.layers.1.mlp.up_proj.weight", "model.language_model.layers.1.mlp.up_proj.weight"),
    "qwen2_5_vl": ("visual.blocks.0.attn.qkv.weight", "model.visual.blocks.0.attn.qkv.weight"),
    "mixtral": ("model.layers.1.block_sparse_moe.experts.2.w2.weight", "model.layers.1.mlp.experts.down_proj"),
    "qwen3_moe": ("model.layers.0.mlp.experts.0.gate_proj.weight", "model.layers.0.mlp.experts.0.gate_proj.weight"),
}


def start(name: str, folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """Returns a model as a run loads it when it starts."""
    if why := architectures.lacking(name):
        pytest.skip(why)
    if not folder.exists():
        architectures.build(name, 47).save_pretrained(folder)
    return architectures.model_class(name).from_pretrained(folder, dtype=dtype)


def trained(name: str, folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """Returns a model all of whose weights have moved."""
    model = start(name, folder, dtype)
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight), alpha=0.1)
    return model


def unequal(model: Any, other: Any) -> list[str]:
    found, expected = model.state_dict(), other.state_dict()
    assert found.keys() == expected.keys() and all(found[name].dtype == expected[name].dtype for name in found)
    return [name for name in expected if not torch.equal(found[name], expected[name])]


@pytest.mark.parametrize("name", CONVERTED)
@pytest.mark.parametrize("shards", ["50GB", "30KB"])
def test_what_was_saved_is_restored_tensor_for_tensor(name: str, shards: str, tmp_path: Path) -> None:
    """Into the parameters that the optimizer and the Trainer know already, frozen ones included."""
    policy = trained(name, tmp_path / "start")
    policy.save_pretrained(tmp_path / "checkpoint-3", max_shard_size=shards)
    assert (tmp_path / "checkpoint-3" / "model.safetensors").exists() == (shards == "50GB")
    model = start(name, tmp_path / "start").requires_grad_(False)
    known = list(model.parameters())
    assert unequal(model, policy)
    assert restore(model, tmp_path / "checkpoint-3")
    assert not unequal(model, policy)
    assert all(one is other for one, other in zip(model.parameters(), known, strict=True))
    assert not any(weight.requires_grad for weight in known)
    # once more, as when an extended run goes on from what a resumed one has saved
    model.save_pretrained(tmp_path / "checkpoint-6")
    again = start(name, tmp_path / "start")
    assert restore(again, tmp_path / "checkpoint-6") and not unequal(again, policy)


def test_each_tensor_keeps_the_precision_that_it_has_in_memory(tmp_path: Path) -> None:
    """A part that the user holds in fp32 beside bf16 is not rounded on the way."""
    policy = trained("mixtral", tmp_path / "start", torch.bfloat16)
    model = start("mixtral", tmp_path / "start", torch.bfloat16)
    for each in (policy, model):
        each.model.layers[0].mlp.experts.float()
        each.lm_head.float()
    with torch.no_grad():
        policy.model.layers[0].mlp.experts.down_proj.add_(1e-4)
        policy.lm_head.weight.add_(1e-4)
    policy.save_pretrained(tmp_path / "checkpoint-3")
    assert restore(model, tmp_path / "checkpoint-3") and not unequal(model, policy)


@pytest.mark.parametrize("name", CONVERTED)
def test_a_tensor_that_is_missing_is_named(name: str, tmp_path: Path) -> None:
    """The start's would stay in its place, or one drawn at random."""
    folder = tmp_path / "checkpoint-3"
    trained(name, tmp_path / "start").save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    gone, said = NEEDED[name]
    del weights[gone]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    model, before = start(name, tmp_path / "start"), start(name, tmp_path / "start")
    with pytest.raises(
        DamagedFileError, match=rf"are 1 of its tensors \({re.escape(said)}\)\. Set `resume_from"
    ) as error:
        restore(model, folder)
    assert str(error.value).startswith(f"{folder} does not hold the model that is trained")
    assert not unequal(model, before)  # nothing half restored


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "qwen3"])
def test_a_model_that_is_saved_as_it_is_stays_the_trainers(name: str, tmp_path: Path) -> None:
    """By the header of the file alone; a tied head, which is saved once, is no difference."""
    folder = tmp_path / "checkpoint-3"
    trained(name, tmp_path / "start").save_pretrained(folder)
    model = start(name, tmp_path / "start")
    assert saved_as_in_memory(model, saved_shapes(folder)) and not restore(model, folder)
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(DamagedFileError, match=r"are 1 of its tensors \(model.layers.1.mlp.up_proj.weight\)"):
        restore(model, folder)


def test_an_adapter_stays_the_trainers(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    adapter = get_peft_model(start("mixtral", tmp_path / "start"), LoraConfig(r=2, target_modules=["q_proj"]))
    adapter.save_pretrained(tmp_path / "checkpoint-3")
    assert not restore(adapter, tmp_path / "checkpoint-3") and saved_shapes(tmp_path / "checkpoint-3") == {}


# -- through the host ---------------------------------------------------------------------------------------------------


@pytest.mark.host
@pytest.mark.parametrize("name", ["gemma3", "mixtral"])
def test_a_run_goes_on_in_the_middle_of_an_iteration(name: str, tmp_path: Path, warm: Warm) -> None:
    """From iteration 1's first checkpoint it ends as it did, bit for bit: every log, pair, figure and weight."""
    shared = tmp_path / "shared"
    architectures.save(name, shared / "model")
    tiny.conversations(shared / "data.jsonl", 19)
    settings = {**settings_in(tmp_path, shared), "tokenizer_type": "PreTrainedTokenizerFast", "save_total_limit": 9}

    def run(**changes: Any) -> str:
        (tmp_path / "run.yml").write_text(yaml.safe_dump({**settings, **changes}))
        env = host.environment(ACCELERATE_USE_CPU="true")
        code, output = warm.run("axolotl.cli.train", "run.yml", env=env, cwd=tmp_path)
        assert code == 0, output[-6000:]
        return output

    run()
    whole = outcome(tmp_path / "out")
    first, middle = (load_file(tmp_path / "out" / f"checkpoint-{step}" / "model.safetensors") for step in (3, 12))
    assert not all(torch.equal(first[tensor], middle[tensor]) for tensor in first)
    checkpoint = tmp_path / "out" / "checkpoint-12"
    output = run(resume_from_checkpoint=str(checkpoint))
    assert f"going on from {checkpoint} (step 12 of 24)" in output
    assert "in the form that the model has in memory" in output and "were not initialized" not in output
    assert not differences(outcome(tmp_path / "out"), whole)
