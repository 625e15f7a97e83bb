"""What is known of a vLLM run before an engine starts (keys, model, memory, devices), and what is made of its answers."""

from __future__ import annotations

import json
import logging
import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import host
import numpy as np
import pytest
from axolotl.utils.dict import DictDefault
from peft import LoraConfig
from transformers import LlamaConfig

from axolotl_spin.generation.backend import Completion, Sampling
from axolotl_spin.generation.chunks import Chunk
from axolotl_spin.generation.vllm.backend import (
    answer_seed,
    checked,
    request,
    sampling_arguments,
    share_of_memory,
    visible_devices,
)
from axolotl_spin.generation.vllm.engine import EngineError, environment, interpreter
from axolotl_spin.generation.vllm.preflight import check_environment
from axolotl_spin.generation.vllm.served import check_serving, served_model
from axolotl_spin.run.identity import _flat, _harmless
from axolotl_spin.settings.generation import VllmConfig
from axolotl_spin.settings.spin import SpinConfig

FAKE = host.TESTS / "fake_vllm"
GIB = 2**30


def settings(**vllm: Any) -> SpinConfig:
    return SpinConfig.model_validate({"generation": {"backend": "vllm", "vllm": vllm, "max_new_tokens": 20}})


def cfg(**changes: Any) -> DictDefault:
    return DictDefault({"base_model": "some/model", "sequence_len": 100, "bf16": True, **changes})


LENGTHS = np.array([10, 60, 95])


# -- keys ---------------------------------------------------------------------------------------------------------------


def test_engine_arguments_go_through_by_their_names() -> None:
    block = VllmConfig.model_validate({"max_num_seqs": 64, "enforce_eager": True, "gpu_memory_utilization": 0.4})
    assert block.engine_arguments() == {"max_num_seqs": 64, "enforce_eager": True, "gpu_memory_utilization": 0.4}


@pytest.mark.parametrize("key", ["model", "tokenizer", "enable_lora", "generation_config", "data_parallel_size"])
def test_an_argument_that_follows_from_other_keys_is_refused(key: str) -> None:
    with pytest.raises(ValueError, match=f"spin.generation.vllm.{key} is set by this plugin"):
        settings(**{key: "x"})


def test_another_engine_is_no_other_run() -> None:
    """Backend and engine settings may change between two starts."""
    spin = SpinConfig(generation={"backend": "vllm", "vllm": {"max_num_seqs": 3, "python": "/x"}})  # type: ignore[arg-type]
    keys = [key for key, _ in _flat(spin.model_dump()) if not _harmless(key)]
    assert keys == [key for key, _ in _flat(SpinConfig().model_dump()) if not _harmless(key)]
    assert not any("vllm" in key for key in keys) and "generation.temperature" in keys


# -- what is served -----------------------------------------------------------------------------------------------------


def test_full_fine_tuning_serves_the_whole_opponent() -> None:
    served = served_model(cfg(revision_of_model="v2"), settings(), LENGTHS)
    assert served.longest == 100  # 95 and the 5 that sequence_len leaves
    arguments = served.arguments(VllmConfig(), Path("/run/opponent"))
    assert arguments["model"] == "/run/opponent" and "revision" not in arguments
    assert arguments["dtype"] == "bfloat16" and arguments["max_model_len"] == 100
    assert "enable_lora" not in arguments and "quantization" not in arguments
    assert served.arguments(VllmConfig())["revision"] == "v2"  # the base model, when it is looked at


def test_of_a_model_that_takes_more_the_language_model_alone_is_served() -> None:
    served = served_model(cfg(is_multimodal=True), settings(), LENGTHS)
    assert served.arguments(VllmConfig())["language_model_only"] is True
    assert "language_model_only" not in served_model(cfg(), settings(), LENGTHS).arguments(VllmConfig())


def test_pictures_are_asked_for_as_many_as_a_prompt_has() -> None:
    arguments = served_model(cfg(is_multimodal=True), settings(), LENGTHS, pictures=3).arguments(VllmConfig())
    assert arguments["limit_mm_per_prompt"] == {"image": 3, "video": 0, "audio": 0}
    assert arguments["skip_tokenizer_init"] is False and "language_model_only" not in arguments


@pytest.mark.parametrize(
    ("targets", "served"),
    [
        (r"model.language_model.layers.[\d]+.(mlp|self_attn).(q|k|v|o)_proj", True),
        (r"model.(language_model|vision_tower).*(q|k|v|o)_proj", False),
        (["q_proj", "v_proj"], False),
        (None, False),
    ],
)
def test_beside_pictures_an_adapter_is_served_that_is_the_language_models(targets: Any, served: bool) -> None:
    config = cfg(adapter="lora", lora_r=8, lora_target_modules=targets)
    assert served_model(config, settings(), LENGTHS).lora_rank == 8
    if served:
        assert served_model(config, settings(), LENGTHS, pictures=1).lora_rank == 8
    else:
        with pytest.raises(ValueError, match=r"`lora_target_modules: .*spin.generation.backend: transformers"):
            served_model(config, settings(), LENGTHS, pictures=1)


@pytest.mark.parametrize(("rank", "expected"), [(4, 8), (8, 8), (20, 32), (512, 512)])
def test_an_adapter_is_served_over_the_base_model(rank: int, expected: int) -> None:
    served = served_model(cfg(adapter="lora", lora_r=rank, bf16=False), settings(), LENGTHS)
    arguments = served.arguments(VllmConfig())
    assert arguments["model"] == "some/model" and arguments["enable_lora"] is True
    assert arguments["max_lora_rank"] == expected and arguments["dtype"] == "float32"


@pytest.mark.parametrize(
    ("keys", "expected"),
    [({"bfloat16": True}, "bfloat16"), ({"float16": True}, "float16"), ({"fp16": True}, "float16")],
)
def test_an_engine_computes_in_the_policys_type(keys: dict[str, bool], expected: str) -> None:
    """The host has two keys for each."""
    assert served_model(cfg(bf16=None, **keys), settings(), LENGTHS).dtype == expected


@pytest.mark.parametrize(
    "keys", [{"qat": {"weight_dtype": "int4"}}, {"nvfp4_merge_aware": True, "adapter": "lora", "lora_r": 8}]
)
def test_weights_that_training_quantises_on_the_fly_are_not_served(keys: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"`{next(iter(keys))}`: vLLM serves the weights as they are"):
        served_model(cfg(**keys), settings(), LENGTHS)


YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}


def test_where_an_engine_reads_the_base_model_it_takes_the_overrides_of_its_config() -> None:
    """The host sets them on the model's config; what is saved of a whole model has them. The user's own come last."""
    keys = {"base_model_config": "some/model", "overrides_of_model_config": {"rope_parameters": YARN}}
    for config in (cfg(**keys), cfg(**keys, adapter="lora", lora_r=8)):
        served = served_model(config, settings(), LENGTHS)
        arguments = json.loads(json.dumps(served.arguments(VllmConfig())))
        assert arguments["hf_overrides"] == {"rope_parameters": YARN} and "hf_config_path" not in arguments
        own = VllmConfig.model_validate({"hf_overrides": {"rope_parameters": None, "x": 1}})
        assert served.arguments(own)["hf_overrides"] == {"rope_parameters": None, "x": 1}
        own = VllmConfig.model_validate({"hf_overrides": {"x": 1}})
        assert served.arguments(own)["hf_overrides"] == {"rope_parameters": YARN, "x": 1}
    assert "hf_overrides" not in served.arguments(VllmConfig(), Path("/run/opponent"))
    other = served_model(cfg(base_model_config="another/model"), settings(), LENGTHS)  # what the check then looks at
    assert other.arguments(VllmConfig())["hf_config_path"] == "another/model"
    assert "hf_config_path" not in other.arguments(VllmConfig(), Path("/run/opponent"))


def test_a_quantized_base_is_served_quantized_unless_the_user_says_otherwise() -> None:
    served = served_model(cfg(adapter="qlora", lora_r=8, load_in_4bit=True), settings(), LENGTHS)
    assert served.arguments(VllmConfig())["quantization"] == "bitsandbytes"
    assert served.arguments(VllmConfig.model_validate({"quantization": None}))["quantization"] is None


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"bnb_4bit_quant_type": "fp4"}, "`bnb_config_kwargs.bnb_4bit_quant_type: fp4`: vLLM quantizes .* with `nf4`"),
        ({"bnb_4bit_use_double_quant": False}, "`bnb_config_kwargs.bnb_4bit_use_double_quant: False`: .* with `True`"),
        ({"llm_int8_skip_modules": ["o_proj"]}, r"`bnb_config_kwargs.llm_int8_skip_modules: \['o_proj'\]`: "),
        ({"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}, None),
        (None, None),
    ],
)
def test_a_base_that_vllm_quantizes_otherwise_is_said(
    given: dict[str, Any] | None, said: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    keys = {"lora_r": 8, "bnb_config_kwargs": given}
    with caplog.at_level(logging.WARNING):
        served_model(cfg(adapter="lora", **keys), settings(), LENGTHS)  # where nothing reads them
        assert served_model(cfg(adapter="qlora", load_in_4bit=True, **keys), settings(), LENGTHS).quantized
    warnings = [record.getMessage() for record in caplog.records]
    assert len(warnings) == (said is not None) and (not said or re.search(said, warnings[0])), warnings


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"adapter": "llama-adapter"}, "adapter"),
        ({"adapter": "lora", "lora_r": 8, "peft_use_dora": True}, "peft_use_dora"),
        ({"adapter": "lora", "lora_r": 8, "lora_modules_to_save": ["lm_head"]}, "lora_modules_to_save"),
        ({"adapter": "lora", "lora_r": 8, "peft_init_lora_weights": "pissa"}, "peft_init_lora_weights"),
        ({"adapter": "lora", "lora_r": 8, "peft": {"loftq_config": {"loftq_bits": 4}}}, "peft.loftq_config.loftq_bits"),
        ({"adapter": "lora", "lora_r": 8, "peft_layer_replication": [[0, 1], [0, 2]]}, "peft_layer_replication"),
        ({"adapter": "lora", "lora_r": 8, "peft_trainable_token_indices": [3]}, "peft_trainable_token_indices"),
        ({"adapter": "lora", "lora_r": 8, "overrides_of_model_kwargs": {"variant": "fp16"}}, "overrides_of_model_kwargs"),
        ({"adapter": "lora", "lora_r": 8, "base_model_config": "another/model"}, "base_model_config"),
        ({"adapter": "lora", "lora_r": 8, "reinit_weights": True}, "reinit_weights"),
        ({"adapter": "lora", "lora_r": 8, "fix_untrained_tokens": [3]}, "fix_untrained_tokens"),
        ({"adapter": "lora", "lora_r": 1024}, "lora_r"),
        ({"adapter": "lora", "lora_r": 8, "lora_rank_pattern": {"q_proj": 1024}}, "lora_rank_pattern"),
    ],
)  # fmt: skip
def test_adapters_that_vllm_cannot_serve_are_refused(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=f"`{named}: .*spin.generation.backend: transformers"):
        served_model(cfg(**changes), settings(), LENGTHS)


@pytest.mark.parametrize(
    ("saved", "expected"),
    [
        ({"r": 20}, 20),
        ({"r": 8, "rank_pattern": {"q_proj": 64, "v_proj": 4}}, 64),
        ({"use_dora": True}, "`use_dora: True`"),
        ({"modules_to_save": ["lm_head"]}, "`modules_to_save: .*lm_head"),
        ({"trainable_token_indices": [3]}, r"`trainable_token_indices: \[3\]`"),
        ({"init_lora_weights": "pissa"}, "`init_lora_weights: pissa`"),
        ({"bias": "all"}, "`bias: all`"),
    ],
)
def test_the_adapter_that_a_run_begins_with_counts_and_not_the_keys(saved: Any, expected: Any, tmp_path: Path) -> None:
    """The host takes all of it from the folder, whatever `lora_r` and its neighbours say, or where they are not set."""
    LoraConfig(**{"r": 8, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", **saved}).save_pretrained(tmp_path)
    configs = [cfg(adapter="lora", lora_model_dir=str(tmp_path), **keys) for keys in ({}, {"lora_r": 1024})]
    for config in configs:
        if isinstance(expected, int):
            assert served_model(config, settings(), LENGTHS).lora_rank == expected
        else:
            named = f"`lora_model_dir: {tmp_path}` .*{expected}.*spin.generation.backend: transformers"
            with pytest.raises(ValueError, match=named):
                served_model(config, settings(), LENGTHS)


def test_an_adapter_without_a_rank_or_a_folder_names_the_key(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`lora_r` is not set"):
        served_model(cfg(adapter="lora"), settings(), LENGTHS)
    with pytest.raises(ValueError, match=f"`lora_model_dir: {tmp_path}`: no adapter can be read there"):
        served_model(cfg(adapter="lora", lora_model_dir=str(tmp_path)), settings(), LENGTHS)


@pytest.mark.parametrize("pattern", [{"lora_rank_pattern": {"q_proj": 64}}, {"lora_alpha_pattern": {"q_proj": 64}}])
@pytest.mark.parametrize(("version", "served"), [("0.31.0", False), ("0.32.0+cpu", True), ("0.32.1rc1", True)])
def test_modules_of_their_own_rank_or_alpha_are_served_where_vllm_scales_them_so(
    version: str, served: bool, pattern: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM 0.28 to 0.31 read `r` and `lora_alpha` alone, and so would answer as another model."""
    monkeypatch.setattr("axolotl_spin.generation.vllm.served.check_environment", lambda *_, **__: version)
    check_serving(served_model(cfg(adapter="lora", lora_r=16), settings(), LENGTHS), VllmConfig())
    model = served_model(cfg(adapter="lora", lora_r=16, **pattern), settings(), LENGTHS)
    assert model.lora_rank == (64 if "lora_rank_pattern" in pattern else 16)
    if served:
        check_serving(model, VllmConfig())
    else:
        with pytest.raises(ValueError, match=f"`{next(iter(pattern))}: .*: vLLM 0.31.0 .*install vLLM 0.32 or later"):
            check_serving(model, VllmConfig())


@pytest.mark.parametrize(
    ("tokens", "changes", "rows"),
    [
        (47, {}, None),
        (40, {}, None),  # the model has rows to spare
        (48, {}, 48),
        (47, {"resize_token_embeddings_to_32x": True}, 64),
        (40, {"shrink_embeddings": True}, 40),
    ],
)
def test_beside_an_adapter_the_embeddings_must_be_the_base_models(
    tokens: int, changes: dict[str, Any], rows: int | None, tmp_path: Path
) -> None:
    """PEFT saves resized embeddings with the adapter, and vLLM refuses such a folder after the first model is loaded."""
    LlamaConfig(vocab_size=47).save_pretrained(tmp_path)
    whole, config = (
        cfg(base_model=str(tmp_path), **changes, **keys) for keys in ({}, {"adapter": "lora", "lora_r": 8})
    )
    served_model(whole, settings(), LENGTHS, tokens=tokens)
    if rows is None:
        served_model(config, settings(), LENGTHS, tokens=tokens)
    else:
        with pytest.raises(
            ValueError, match=f"makes {rows} rows .* {tokens} tokens .*`base_model: .*` has 47: .*`tokens`"
        ):
            served_model(config, settings(), LENGTHS, tokens=tokens)


def test_prompts_must_fit_into_the_engine() -> None:
    with pytest.raises(ValueError, match=r"spin.generation.vllm.max_model_len: 99` is less than 100"):
        served_model(cfg(), settings(max_model_len=99), LENGTHS)
    served = served_model(cfg(), settings(max_model_len=4096), LENGTHS)
    assert served.arguments(settings(max_model_len=4096).generation.vllm)["max_model_len"] == 4096
    assert served_model(cfg(), settings(), np.array([10, 60])).longest == 80


@pytest.mark.parametrize("variable", ["LOCAL_WORLD_SIZE", "LOCAL_SIZE"])
@pytest.mark.parametrize(("here", "size", "fits"), [("4", 3, False), ("2", 4, False), (None, 2, False), ("4", 2, True)])
def test_ranks_are_grouped_whole(
    here: str | None, size: int, fits: bool, variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second variable is that of DeepSpeed's own launcher."""
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        monkeypatch.delenv(name, raising=False)
    if here:
        monkeypatch.setenv(variable, here)
    monkeypatch.setattr("axolotl_spin.generation.vllm.served.check_environment", lambda *_, **__: "0.32.0")
    served, engine = served_model(cfg(), settings(), LENGTHS), VllmConfig(tensor_parallel_size=size)
    if fits:
        check_serving(served, engine)
    else:
        with pytest.raises(ValueError, match=f"tensor_parallel_size: {size}` does not divide the {here or 1} rank"):
            check_serving(served, engine)


# -- the environment ----------------------------------------------------------------------------------------------------


def check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, gpu: bool = False, python: str | None = None, **env: str
) -> str:
    (tmp_path / "model").mkdir(exist_ok=True)
    (tmp_path / "model" / "config.json").write_text("{}")
    for name, value in {"PYTHONPATH": str(FAKE), "TMPDIR": str(tmp_path), **env}.items():
        monkeypatch.setenv(name, value)
    served = served_model(cfg(base_model=str(tmp_path / "model")), settings(), LENGTHS)
    arguments = {**served.arguments(VllmConfig()), **json.loads(os.environ.get("MORE", "{}"))}
    return check_environment(python, arguments, check_model=True, needs_gpu=gpu)


def test_a_sound_environment_passes_and_nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert check(tmp_path, monkeypatch) == "0.32.0"
    assert not list(tmp_path.glob("axolotl-spin-*"))


@pytest.mark.parametrize(
    ("env", "gpu", "expected"),
    [
        ({"FAKE_VLLM": "import"}, False, "vLLM cannot be imported by .* \\(libcudart.so.99: .*pip install vllm"),
        ({"PYTHONPATH": ""}, False, "vLLM cannot be imported by .*spin.generation.vllm.python"),
        ({"FAKE_VLLM_VERSION": "0.9.2"}, False, "has vLLM 0.9.2; versions from 0.28 up to, not including, 0.33 work"),
        ({"FAKE_VLLM_VERSION": "0.33.0"}, False, "has vLLM 0.33.0; versions from"),
        ({"FAKE_VLLM_DEVICE": ""}, False, "no device .*spin.generation.backend: transformers"),
        ({}, True, "a build of vLLM 0.32.0 for CPUs, while training runs on a GPU"),
        ({"FAKE_VLLM": "model"}, False, "WeirdForCausalLM.*are not supported"),
        (
            {"MORE": '{"quantization": "bitsandbytes"}'},
            False,
            f"`load_in_4bit: true`: vLLM 0.32.0 .*`{sys.executable} -m pip install vllm-bnb-plugin`",
        ),
        ({"MORE": '{"max_num_seq": 3}'}, False, "no engine argument `max_num_seq`: did you mean `max_num_seqs`"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_an_environment_is_said(
    env: dict[str, str], gpu: bool, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=expected):
        check(tmp_path, monkeypatch, gpu=gpu, **env)
    assert not list(tmp_path.glob("axolotl-spin-*"))


def test_a_wrong_interpreter_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"spin.generation.vllm.python: /nowhere/python` is no program"):
        interpreter("/nowhere/python")
    with pytest.raises(ValueError, match=r"python: /bin/false` could not be asked about vLLM \(exit status 1\)"):
        check(tmp_path, monkeypatch, python="/bin/false")


def test_an_engine_gets_the_users_environment_without_the_launchers(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "3", "MASTER_ADDR": "node7", "HF_HOME": "/hf", "PYTHONPATH": "/x"}.items():
        monkeypatch.setenv(name, value)
    own = environment(sys.executable, {"OMP_NUM_THREADS": "5"})
    assert not {"RANK", "MASTER_ADDR"} & set(own) and own["HF_HOME"] == "/hf" and own["PYTHONPATH"] == "/x"
    assert own["VLLM_HOST_IP"] == "127.0.0.1" and own["OMP_NUM_THREADS"] == "5"
    assert "PYTHONPATH" not in environment("/other/python", {})


@pytest.mark.parametrize("key", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"])
@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("expandable_segments:True", None),  # what the host's command sets
        ("expandable_segments:True,roundup_power2_divisions:16", "roundup_power2_divisions:16"),
        (
            "max_split_size_mb:64, expandable_segments:True,roundup_power2_divisions:[256:1,512:2]",
            "max_split_size_mb:64,roundup_power2_divisions:[256:1,512:2]",
        ),
        ("max_split_size_mb:64", "max_split_size_mb:64"),
    ],
)
def test_an_engines_memory_does_not_move(
    key: str, given: str, kept: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM's own all-reduce opens other GPUs' memory, which growing segments do not allow."""
    monkeypatch.setenv(key, given)
    assert environment(sys.executable, {}).get(key) == kept
    assert os.environ[key] == given  # training's


# -- memory and devices -------------------------------------------------------------------------------------------------


def test_the_engine_takes_what_training_leaves() -> None:
    assert share_of_memory(None, free=40 * GIB, total=80 * GIB) == 0.45
    assert share_of_memory(0.4, free=40 * GIB, total=80 * GIB) == 0.4
    with pytest.raises(
        EngineError, match=r"0.6` is 48.0 GiB of the GPU's 80.0, and training leaves 40.0 .* at most 0.49"
    ):
        share_of_memory(0.6, free=40 * GIB, total=80 * GIB)


CUDA, HIP = "CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"


@pytest.mark.parametrize(
    ("first", "count", "variables", "expected"),
    [
        (0, 1, {}, {CUDA: "0"}),
        (2, 2, {}, {CUDA: "2,3"}),
        (1, 1, {CUDA: "4,6"}, {CUDA: "6"}),
        (0, 2, {CUDA: "GPU-a,GPU-b"}, {CUDA: "GPU-a,GPU-b"}),
        (1, 1, {HIP: "4,5"}, {CUDA: "5", HIP: "5"}),
        (0, 2, {HIP: "4,5,6", CUDA: "0,1,2"}, {CUDA: "4,5", HIP: "4,5"}),
        (1, 1, {HIP: "", CUDA: "4,5"}, {CUDA: "5"}),
    ],
)
def test_an_engine_sees_its_ranks_gpus(
    first: int, count: int, variables: dict[str, str], expected: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert visible_devices(first, count, variables, rocm=HIP in variables) == expected
    if HIP in variables:  # left over on a machine with other GPUs, where nothing reads it
        shown = visible_devices(first, count, variables)
        assert shown == visible_devices(first, count, {CUDA: variables[CUDA]} if CUDA in variables else {})


# -- answers ------------------------------------------------------------------------------------------------------------

CHUNK = Chunk(5, (7, 3), (np.array([1, 2]), np.array([3])), (3, 2), seed=11)
SAMPLING = Sampling(1.0, 0.9, 40, (6,))


def test_a_request_is_plain_json_with_a_seed_for_each_answer() -> None:
    asked = json.loads(json.dumps(request(CHUNK)))
    assert asked == {
        "index": 5,
        "prompts": [[1, 2], [3]],
        "limits": [3, 2],
        "seeds": [answer_seed(11, 7), answer_seed(11, 3)],
    }
    assert len({answer_seed(seed, row) for seed in range(50) for row in range(50)}) == 2500
    assert all(0 <= answer_seed(seed, 1) < 2**62 for seed in range(50))
    assert sampling_arguments(SAMPLING) == {"temperature": 1.0, "top_p": 0.9, "stop_token_ids": [6], "top_k": 40}
    assert "top_k" not in sampling_arguments(Sampling(1.0, 1.0, None, ()))


def test_answers_keep_their_end_token_and_reason() -> None:
    assert checked(CHUNK, [[9, 9, 6], [9, 9]], ["stop", "length"], SAMPLING) == [
        Completion([9, 9, 6], "stop"),
        Completion([9, 9], "length"),
    ]


@pytest.mark.parametrize(
    ("ids", "reasons", "why"),
    [
        ([[9, 6]], ["stop"], "1 answers to the 2 prompts of chunk 5"),
        (None, None, "0 answers"),
        ([[9, 6], []], ["stop", "length"], "prompt 3 is no list of token ids"),
        ([[9, 6], ["a"]], ["stop", "length"], "prompt 3 is no list of token ids"),
        ([[9, 6], [-1, 6]], ["stop", "stop"], "prompt 3 is no list of token ids"),
        ([[9, 6], [9]], ["stop", "length"], "prompt 3 ended by 'length' after 1 of at most 2"),
        ([[6, 9, 6], [9, 9]], ["stop", "length"], r"prompt 7 .* stop tokens at \[0, 2\]"),
        ([[9, 9], [9, 9]], ["stop", "length"], "prompt 7 ended by 'stop'"),
        ([[9, 6], [9, 9]], ["abort", "length"], "prompt 7 ended by 'abort'"),
        ([[9, 9, 9, 6], [9, 9]], ["stop", "length"], "prompt 7 ended by 'stop' after 4 of at most 3"),
    ],
)
def test_wrong_answers_are_refused(ids: Any, reasons: Any, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        checked(CHUNK, ids, reasons, SAMPLING)


def test_engines_share_the_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight ranks in groups of two: four engines, led by every second rank, each with every fourth chunk."""
    from axolotl_spin.generation.vllm.backend import VllmBackend

    led = {}
    for rank in range(8):
        ranks = SimpleNamespace(count=8, rank=rank)
        backend = VllmBackend(ranks, SAMPLING, VllmConfig(tensor_parallel_size=2), *[None] * 3, optimizer=None)  # type: ignore[arg-type]
        if backend.leads:
            led[rank] = [chunk for chunk in range(10) if chunk in backend.share(10)]
    assert led == {0: [0, 4, 8], 2: [1, 5, 9], 4: [2, 6], 6: [3, 7]}
