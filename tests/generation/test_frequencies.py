"""Models whose frequencies change with the length: where a run can get there, and what is then refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
from axolotl.utils.dict import DictDefault
from datasets import Dataset
from transformers import Gemma3Config, LlamaConfig, Phi3Config

from axolotl_spin.generation.frequencies import refuse_switches, switch_lengths
from axolotl_spin.settings.spin import SpinConfig

FACTORS = {"short_factor": [1.0] * 4, "long_factor": [9.0] * 4}
LONG = {"rope_type": "longrope", "rope_theta": 1e4, **FACTORS, "original_max_position_embeddings": 16}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}


def phi(**changes) -> Phi3Config:
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "max_position_embeddings": 64, "pad_token_id": 0}
    return Phi3Config(**{**sizes, "original_max_position_embeddings": 16, "rope_parameters": LONG, **changes})


def test_lengths_stand_in_the_config_of_the_text() -> None:
    assert switch_lengths(phi()) == (16,) and switch_lengths(phi(), "dynamic") == ()
    assert switch_lengths(LlamaConfig()) == switch_lengths(LlamaConfig(), "dynamic") == ()
    stretched = LlamaConfig(max_position_embeddings=32, rope_parameters=DYNAMIC)
    assert switch_lengths(stretched, "dynamic") == (32,) and switch_lengths(stretched) == ()
    by_layer = {"sliding_attention": {"rope_type": "default", "rope_theta": 1e4}, "full_attention": LONG}
    assert switch_lengths(Gemma3Config(text_config={"rope_parameters": by_layer})) == (16,)


def check(folder: Path, *, most: int, pictures: bool = False, served: int | None = None, human: int = 3) -> None:
    cfg = DictDefault({"base_model": str(folder), "sequence_len": 60})
    settings = SpinConfig.model_validate({"generation": {"max_new_tokens": most}})
    rows = Dataset.from_dict({"prompt_ids": [[7] * 4, [7] * 10], "chosen_ids": [[8] * human, [8]]})
    refuse_switches(cfg, settings, [rows, None], pictures=pictures, served_len=served)


def test_what_is_refused_depends_on_the_longest_answer(tmp_path: Path) -> None:
    """Prompts of 4 and 10 tokens; another length from 16 on."""
    phi().save_pretrained(tmp_path / "long")
    check(tmp_path / "long", most=50)  # rows are told apart by their length
    check(tmp_path / "long", most=6, pictures=True, served=16)
    for how, message in (
        ({"pictures": True}, "prompts with pictures"),
        ({"served": 17}, "`spin.generation.backend: vllm`"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            check(tmp_path / "long", most=7, **how)
        assert "set `sequence_len` to at most 16, or lower `spin.generation.max_new_tokens`" in str(caught.value)
    tiny.model(20, max_position_embeddings=16, rope_parameters=DYNAMIC).config.save_pretrained(tmp_path / "dynamic")
    check(tmp_path / "dynamic", most=6, human=12)
    for how in ({"most": 7}, {"most": 6, "human": 13}):
        with pytest.raises(ValueError, match="a prompt and its answer may have 17: set `sequence_len`"):
            check(tmp_path / "dynamic", **how)
    with pytest.raises(ValueError, match="vLLM turns positions by other frequencies"):
        check(tmp_path / "dynamic", most=1, served=11)
    tiny.model(20, max_position_embeddings=16).config.save_pretrained(tmp_path / "plain")
    check(tmp_path / "plain", most=50, pictures=True, served=60)
