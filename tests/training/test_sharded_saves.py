"""ZeRO-3 and FSDP as the host's own examples ask for them: shards that become a model, FSDP without a version."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import host
import pytest
import torch
from packaging.version import Version
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from warm import Ranks

pytestmark = [pytest.mark.host, pytest.mark.ranks]


def test_zero3_without_gathering_saves_shards_that_become_the_model(tmp_path: Path, warm_ranks: Ranks) -> None:
    """The same run with the key saves the model whole: the last shards hold the same weights."""
    changes = host.layout("zero3", tmp_path)
    changes["spin"] = {"iterations": 2, "generation": {"max_new_tokens": 6, "batch_size": 8}}
    whole = host.train(host.config(tmp_path, **changes), "zero3", by=warm_ranks)
    path = Path(changes["deepspeed"])
    settings = json.loads(path.read_text())
    del settings["zero_optimization"]["gather_16bit_weights_on_model_save"]
    path.write_text(json.dumps(settings))
    run = host.train(
        host.config(tmp_path, **{**changes, "output_dir": str(tmp_path / "shards")}), "zero3", by=warm_ranks
    )
    assert "zero_to_fp32.py . . --safe_serialization" in run.output and "zero_to_fp32.py ." not in whole.output
    for iteration in range(2):
        folder = run.out / "spin" / f"iteration-{iteration}" / "model"
        assert not list(folder.glob("*.safetensors"))
    command = [sys.executable, "zero_to_fp32.py", ".", ".", "--safe_serialization"]
    subprocess.run(command, cwd=folder, env=host.environment(), check=True, capture_output=True)
    made = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    weights = load_file(whole.out / "spin" / "iteration-1" / "model" / "model.safetensors")
    assert weights.keys() <= made.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(made[name].to(weight.dtype), weight, rtol=0, atol=1e-6)
    shutil.rmtree(run.out)


def test_fsdp_without_a_version_runs_as_fsdp2(tmp_path: Path, warm_ranks: Ranks) -> None:
    """The block of the host's older examples, of which Axolotl 0.19 makes FSDP1 and later hosts refuse the strategy."""
    changes = host.layout("fsdp2", tmp_path)
    del changes["fsdp_version"]
    if Version(version("axolotl")) < Version("0.21"):  # which refuses the list itself
        changes["fsdp"] = ["full_shard", "auto_wrap"]
    changes["fsdp_config"] = {
        "fsdp_limit_all_gathers": True,
        "fsdp_sync_module_states": True,
        "fsdp_use_orig_params": False,
        "fsdp_cpu_ram_efficient_loading": True,
        "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "fsdp_transformer_layer_cls_to_wrap": "LlamaDecoderLayer",
        "fsdp_state_dict_type": "FULL_STATE_DICT",
        "fsdp_sharding_strategy": "FULL_SHARD",
    }
    changes["spin"] = {"iterations": 2, "generation": {"max_new_tokens": 6, "batch_size": 8}}
    run = host.train(host.config(tmp_path, **changes), "fsdp2", by=warm_ranks)
    assert "`fsdp_version: 2` is taken" in run.output
    firsts = [run.metrics(iteration)["loss_first"] for iteration in range(2)]
    assert firsts == pytest.approx([0.6931472] * 2, abs=1e-5)
