"""A trained head on tied embeddings: what the host's `merge-lora` makes of it, and what is said before training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import host
import pytest
import tiny
import torch
import yaml
from axolotl.cli.merge_lora import do_cli  # which sets up logging, so before a test listens
from peft import LoraConfig, PeftModel, get_peft_model
from rows import load
from transformers import AutoModelForCausalLM

PLAIN = ["q_proj"]
KEYS = {
    "head": {"lora_modules_to_save": ["lm_head"], "lora_target_modules": PLAIN},
    "embeddings": {"lora_modules_to_save": ["embed_tokens"], "lora_target_modules": PLAIN},
    "head, by PEFT": {"lora_modules_to_save": ["lm_head"], "lora_target_modules": PLAIN, "merge_method": "legacy"},
    "LoRA on the head": {"lora_target_modules": [*PLAIN, "lm_head"]},
    "LoRA on the head, by PEFT": {"lora_target_modules": [*PLAIN, "lm_head"], "merge_method": "legacy"},
    "neither": {"lora_target_modules": PLAIN},
}
SAID = {
    "head": "`merge_method: legacy`", "embeddings": "`merge_method: legacy`",
    "LoRA on the head": "by either `merge_method`", "LoRA on the head, by PEFT": "by either `merge_method`",
}  # fmt: skip


def merged_is_off_by(folder: Path, keys: dict[str, Any]) -> float:
    """Returns the largest difference of logits between an adapter and what the host merges of it."""
    base, out = folder / "model", folder / "out"
    settings = LoraConfig(
        r=4, lora_alpha=8, task_type="CAUSAL_LM", init_lora_weights=False,
        target_modules=keys["lora_target_modules"], modules_to_save=keys.get("lora_modules_to_save"),
    )  # fmt: skip
    torch.manual_seed(1)
    adapter = get_peft_model(AutoModelForCausalLM.from_pretrained(base), settings)
    with torch.no_grad():
        for weight in filter(lambda weight: weight.requires_grad, adapter.parameters()):
            weight.add_(torch.randn_like(weight) * 0.3)
    adapter.save_pretrained(out)
    config = {
        **host.config(folder, rows=4),
        **host.LORA,
        **keys,
        "lora_target_linear": None,
        "lora_model_dir": str(out),
    }
    (folder / "merge.yml").write_text(yaml.safe_dump(config))
    do_cli(str(folder / "merge.yml"))
    ids = torch.arange(4, 30)[None]
    wanted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), out).eval()(ids).logits
    return float((AutoModelForCausalLM.from_pretrained(out / "merged")(ids).logits - wanted).abs().max())


@pytest.mark.parametrize(
    "case", [case if case in ("head", "neither") else pytest.param(case, marks=pytest.mark.once) for case in KEYS]
)
def test_what_merging_loses_is_said(case: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tiny.save(tmp_path / "model", tie_word_embeddings=True)
    tiny.conversations(tmp_path / "data.jsonl", 8)
    load(tmp_path, **{**host.LORA, "lora_target_linear": None, **KEYS[case]})
    said = [line for line in caplog.text.splitlines() if "with tied embeddings" in line]
    assert [SAID[case] in line for line in said] == [True] * (case in SAID)
    off = merged_is_off_by(tmp_path, KEYS[case])
    assert off > 1 if case in SAID else off < 1e-3


def test_untied_embeddings_are_merged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    load(tmp_path, **{**host.LORA, "lora_target_linear": None, **KEYS["head"]})
    assert "tied embeddings" not in caplog.text
    assert merged_is_off_by(tmp_path, KEYS["head"]) < 1e-3
