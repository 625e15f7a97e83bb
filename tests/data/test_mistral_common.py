"""`tokenizer_use_mistral_common: true`: a tokenizer without text templates, which renders conversations as tokens."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import host
import mistral_common
import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM
from warm import Warm

pytestmark = pytest.mark.host

END_OF_PROMPT, EOS = 4, 2  # [/INST], </s>


@pytest.mark.parametrize("turns", [pytest.param("last", marks=pytest.mark.once), "all"])
def test_prompts_are_the_tokenizers_own(tmp_path: Path, warm: Warm, turns: str) -> None:
    """With the tokenizer file that mistral-common brings: whole turns, their end among the answers' tokens, ln 2."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "initializer_range": 0.1}
    ids = {"vocab_size": 131072, "bos_token_id": 1, "eos_token_id": EOS, "pad_token_id": 11}
    MistralForCausalLM(MistralConfig(**sizes, **heads, **ids)).save_pretrained(tmp_path / "model")
    shutil.copy(Path(mistral_common.__file__).parent / "data/tekken_240911.json", tmp_path / "model/tekken.json")
    rows = []
    for number in range(8):
        said = [f"say {number}", f"it is {number}", f"again {number}", f"so {number} it is"]
        rows.append(
            {"messages": [{"role": ("user", "assistant")[at % 2], "content": text} for at, text in enumerate(said)]}
        )
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = host.config(
        tmp_path,
        base_model=str(tmp_path / "model"),
        tokenizer_use_mistral_common=True,
        chat_template=None,
        datasets=[{"path": str(tmp_path / "rows.jsonl"), "ds_type": "json", "type": "chat_template"}],
        spin={"iterations": 2, "turns": turns, "generation": {"max_new_tokens": 6, "batch_size": 8}},
    )
    run = host.train(settings, by=warm)
    pairs = run.pairs(0).to_pylist()
    assert len(pairs) == (8 if turns == "last" else 16)
    assert {pair["prompt_ids"][-1] for pair in pairs} == {END_OF_PROMPT}
    assert {tuple(pair["prompt_ids"][:2]) for pair in pairs} == {(1, 3)}  # <s>[INST]
    assert {pair["chosen_ids"][-1] for pair in pairs} == {EOS}
    last = [pair for pair in pairs if pair["prompt_ids"].count(END_OF_PROMPT) == 2]
    assert sorted(pair["chosen"] for pair in last) == [f"so {number} it is</s>" for number in range(8)]
    assert [run.metrics(iteration)["loss_first"] for iteration in range(2)] == pytest.approx([0.6931472] * 2, abs=1e-5)
