"""A key of ours where nothing reads it: each is refused with the place where it belongs, and no key of the host's is."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from axolotl.utils.schemas.config import AxolotlConfigWCapabilities, AxolotlInputConfig

from axolotl_spin.keys import levels, refuse_misplaced
from axolotl_spin.refusals import refused_keys
from axolotl_spin.settings.spin import SpinConfig

LEVELS = levels(SpinConfig)

HOST = AxolotlInputConfig.model_fields.keys() | {"spin"}
# names of ours that the host has at the top of a config, with a meaning of its own
SHARED = {"learning_rate", "seed", "batch_size", "vllm", "tensor_parallel_size"}


def refusal(text: str) -> str:
    """Returns what is said of a config; an empty text where nothing is."""
    try:
        refuse_misplaced(yaml.safe_load(text), LEVELS, HOST, refused_keys(HOST))
    except ValueError as error:
        return str(error)
    return ""


def test_the_blocks_of_ours() -> None:
    assert list(LEVELS) == ["spin", "spin.generation", "spin.generation.vllm"]
    assert (
        "iterations" in LEVELS["spin"]
        and "top_k" in LEVELS["spin.generation"]
        and "python" in LEVELS["spin.generation.vllm"]
    )


def test_the_host_shares_these_names_of_ours_and_no_others() -> None:
    ours = {key for keys in LEVELS.values() for key in keys}
    for schema in (AxolotlInputConfig, AxolotlConfigWCapabilities):
        aliases = {field.alias for field in schema.model_fields.values()}
        assert ours & (schema.model_fields.keys() | aliases) == SHARED


@pytest.mark.once
@pytest.mark.parametrize("level", LEVELS)
def test_every_key_of_ours_is_found_at_the_top(level: str) -> None:
    for key in LEVELS[level]:
        said = refusal(f"{key}: 1")
        if key in SHARED:
            assert not said, key
        else:
            assert said == f"`{key}` stands at the top of the config, where nothing reads it: write `{level}.{key}`"


@pytest.mark.once
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("found_in", LEVELS)
def test_every_key_of_ours_is_found_in_another_block(level: str, found_in: str) -> None:
    for key in LEVELS[level]:
        block: Any = {key: 1}
        for name in reversed(found_in.split(".")):
            block = {name: block}
        said = refusal(yaml.safe_dump(block))
        if level == found_in or (found_in, key) == ("spin.generation.vllm", "seed"):  # an engine argument of vLLM's too
            assert not said, (key, said)
        else:
            assert said.startswith(f"`{found_in}.{key}` stands in the wrong place: write `{level}.{key}`"), (key, said)


@pytest.mark.once
@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("spin: {num_epochs: 2}", "`spin.num_epochs` stands in the wrong place: write the host's `num_epochs`, at the top"),
        ("spin: {seed: 2}", "write `spin.generation.seed` or the host's `seed`, at the top"),
        ("spin: {rl_beta: 0.1}", "`spin.rl_beta` stands in the wrong place: write `spin.beta`"),
        ("spin: {generation: {dpo_beta: 0.1}}", "write `spin.beta`"),
        ("spin: {trainer_cls: a.B}", "there is no key `spin.trainer_cls`: `spin` has beta,"),
        ("spin: {trl: {}}", "there is no key `spin.trl`: `spin` has beta,"),
        ("spin: {iteration: 2}", "there is no key `spin.iteration`: did you mean `spin.iterations`?"),
        ("spin: {Beta: 2}", "did you mean `spin.beta`?"),
        ("spin: {temprature: 2}", "there is no key `spin.temprature`: did you mean `spin.generation.temperature`?"),
        ("spin: {generation: {max_tokens: 3}}", "did you mean `spin.generation.max_new_tokens`?"),
        ("spin: {zebra: 1}", "there is no key `spin.zebra`: `spin` has beta, eval_chat_template,"),
        ("spin: {active: true}", "there is no key `spin.active`"),
        ("SPIN: {iterations: 2}", "`SPIN` is a block that nothing reads: did you mean `spin`?"),
        ("generation: {max_new_tokens: 2}", "write `spin.generation`"),
        ("{spin: {generation: {backend: vllm}}, vllm: {dtype: auto}}", "SPIN's engines read `spin.generation.vllm`"),
    ],
)  # fmt: skip
def test_what_is_said(text: str, said: str) -> None:
    assert said in refusal(text)


@pytest.mark.once
@pytest.mark.parametrize(
    "block", ["generation: {tensor_parallel_size: 2}", "vllm: {}", "rl_beta: 1", "kto_desirable_weight: 1"]
)
def test_what_is_refused_at_the_top_is_sent_to_no_place_there(block: str) -> None:
    said = refusal(f"spin: {{{block}}}")
    assert said and "at the top" not in said


@pytest.mark.once
@pytest.mark.parametrize(
    "text",
    [
        "{learning_rate: 1.0e-6, seed: 3, spin: {learning_rate: 1.0e-6, generation: {seed: 4}}}",
        "spin: {generation: {backend: vllm, vllm: {enforce_eager: true, seed: 1, tensor_parallel_size: 2}}}",
        "{iterations: null, vllm: {dtype: auto}}",
        "{unheard_of: 1, spin: null}",
        "spin: {generation: vllm}",
    ],
)
def test_what_is_left_alone(text: str) -> None:
    assert refusal(text) == ""


@pytest.mark.once
def test_all_are_named_at_once() -> None:
    said = refusal("{iterations: 3, history: 1, spin: {max_new_tokens: 4}}")
    assert [line.split("`")[1] for line in said.splitlines()] == ["iterations", "history", "spin.max_new_tokens"]
