"""The `spin:` block and the claim of `rl: spin`: what is taken, and how what is wrong is refused."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import rows
import torch
from axolotl.utils.schemas.config import AxolotlInputConfig
from pydantic import ValidationError, create_model

from axolotl_spin import SpinPlugin
from axolotl_spin.args import SpinArgs, spin_config
from axolotl_spin.launched import refuse_devices, refuse_loaded, saves_sharded
from axolotl_spin.refusals import REFUSED, refuse_leftovers
from axolotl_spin.run.merging import describe_shards
from axolotl_spin.set_aside import SET_ASIDE, set_aside
from axolotl_spin.settings.spin import SpinConfig

# the host's keys, without its checks
HostKeys = create_model("HostKeys", **{key: (Any, None) for key in AxolotlInputConfig.model_fields})


class Config(HostKeys, SpinArgs):  # type: ignore[valid-type]
    """As the host merges its schema and ours."""


def claim(**config) -> dict:
    """Validates a config as the host does: ours is one of the bases of its schema."""
    data = {"rl": "spin", **config}
    validated = Config.model_validate(data)
    return {**data, **validated.model_dump(exclude_none=True), "rl": data["rl"]}


def test_rl_spin_becomes_sft_with_an_active_block() -> None:
    claimed = claim()
    assert claimed["rl"] is None
    settings = spin_config(claimed)
    assert (settings.iterations, settings.beta, settings.history, settings.loss) == (3, 0.1, 1, "sigmoid")
    assert settings.generation.temperature == 1.0
    assert settings.restart_optimizer and settings.save_iterations


@pytest.mark.parametrize("config", [{"rl": "dpo"}, {"rl": None}, {}])
def test_other_configs_are_untouched(config: dict) -> None:
    before = dict(config)
    assert SpinArgs.model_validate(config).spin is None
    assert config == before
    assert spin_config(config) is None


def test_validating_twice_keeps_the_claim() -> None:
    """Under Ray the host validates on the driver and on each worker."""
    again = claim(spin={"iterations": 2})
    assert SpinArgs.model_validate(again).spin.iterations == 2


def test_a_block_without_the_switch_is_refused() -> None:
    with pytest.raises(ValidationError, match="write `rl: spin`"):
        SpinArgs.model_validate({"spin": {"iterations": 2}})


def test_numbers_per_iteration() -> None:
    settings = SpinConfig(iterations=2, beta=[0.1, 5], learning_rate="5e-7")
    assert settings.betas() == [0.1, 5.0]
    assert settings.learning_rates(1e-3) == [5e-7, 5e-7]
    assert SpinConfig(iterations=2).learning_rates(1e-3) == [1e-3, 1e-3]
    assert SpinConfig(iterations=2, learning_rate=["5e-7", 1e-7]).learning_rates(1.0) == [5e-7, 1e-7]


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({"iteration": 2}, "did you mean `spin.iterations`"),
        ({"generation": {"max_tokens": 3}}, "did you mean `spin.generation.max_new_tokens`"),
        ({"iterations": 0}, "greater than or equal to 1"),
        ({"beta": 0}, "greater than 0"),
        ({"beta": -1}, "greater than 0"),
        ({"beta": "high"}, "number"),
        ({"beta": float("nan")}, "finite"),
        ({"beta": [0.1, 0.1]}, "spin.beta lists 2 values, but spin.iterations is 3"),
        ({"learning_rate": [1e-6]}, "spin.learning_rate lists 1 values"),
        ({"iterations": 2, "history": 2}, "spin.history is 2, but only 0 to 1"),
        ({"history": -1}, "greater than or equal to 0"),
        ({"loss": "ipo"}, "'sigmoid', 'hinge' or 'space'"),
        ({"sft_weight": -0.1}, "greater than or equal to 0"),
        ({"max_prompts": 0}, "greater than or equal to 1"),
        ({"turns": "first"}, "'last' or 'all'"),
        ({"generation": {"backend": "sglang"}}, "transformers"),
        ({"generation": {"temperature": -1}}, "greater than or equal to 0"),
        ({"generation": {"top_p": 0}}, "greater than 0"),
        ({"generation": {"top_k": 0}}, "greater than or equal to 1"),
        ({"generation": {"batch_size": 0}}, "greater than or equal to 1"),
        ({"generation": {"max_new_tokens": 0}}, "greater than or equal to 1"),
        ({"eval_prompts": True}, "expected a number, got true"),
        ({"max_prompts": True}, "expected a number, got true"),
        ({"sft_weight": False}, "expected a number, got false"),
        ({"beta": True}, "expected a number"),
        ({"generation": {"max_new_tokens": True}}, "expected a number, got true"),
        ({"generation": {"temperature": False}}, "expected a number, got false"),
        ({"generation": {"vllm": {"max_model_len": True}}}, "expected a number, got true"),
        ("yes", "block of keys"),
    ],
)
def test_wrong_blocks_are_refused(block, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        claim(spin=block)


# one offending value per refused key; the keys must cover the table
OFFENDING = {
    "streaming": True, "pretraining_dataset": "x", "attn_implementation": "xformers",
    "scaling_softmax": True, "diffusion_lm": {"noise_schedule": "linear"},
    "reward_model": True, "process_reward_model": True, "context_parallel_size": 2,
    "sequence_parallel_degree": 2, "tensor_parallel_size": "2", "expert_parallel_size": 2, "relora": True,
    "fsdp": ["hybrid_shard", "auto_wrap"],
    "peft_init_lora_weights": "pissa_niter_16", "use_pose": True,
    "auto_find_batch_size": True, "trainer_cls": "a.B", "rl_beta": 0.1, "dpo_beta": 0.1, "dpo_loss_type": ["ipo"],
    "balance_labels": True, "jagged_restart_steps": 10,
    "lr_scheduler": "reduce_lr_on_plateau", "optimizer": "schedule_free_adamw", "num_epochs": 1.5,
    "micro_batch_size": "0", "gradient_accumulation_steps": -1, "learning_rate": 0.0,
}  # fmt: skip


@pytest.mark.parametrize("key", sorted({key for key, _, _ in REFUSED}))
def test_keys_that_do_not_work_are_refused_by_name(key: str) -> None:
    with pytest.raises(ValidationError, match=f"`{key}: "):
        claim(**{key: OFFENDING[key]})


@pytest.mark.parametrize(
    "config",
    [
        {"context_parallel_size": 1, "tensor_parallel_size": 1, "num_epochs": 2.0, "lr_scheduler": "cosine"},
        {"num_epochs": "3", "micro_batch_size": "2", "gradient_accumulation_steps": "4", "context_parallel_size": "1"},
        {"optimizer": "adamw_torch_fused", "load_best_model_at_end": False, "sample_packing": True},
        {"fsdp_version": 2, "fsdp_config": {"auto_wrap_policy": "TRANSFORMER_BASED_WRAP"}},
        {"is_multimodal": True, "freeze_mm_modules": True},
    ],
)
def test_keys_that_work_pass(config: dict) -> None:
    assert claim(**config)["spin"]["active"]


def test_numbers_that_are_strings_are_the_hosts_to_read(tmp_path: Path) -> None:
    run, *_ = rows.load(tmp_path, num_epochs="3", micro_batch_size="2", gradient_accumulation_steps="4")
    assert run.plan.total_epochs == 2 * 3 and run.plan.global_batch == 8


def test_every_offending_key_is_named_at_once() -> None:
    with pytest.raises(ValidationError, match=r"(?s)`relora.*`trainer_cls"):
        claim(relora=True, trainer_cls="a.B")
    with pytest.raises(ValueError, match=r"(?s)`trl:`.*`kto_desirable_weight.*`datasets\[1\]` \(b\)"):
        refuse_leftovers(
            {
                "trl": {"beta": 0.1},
                "kto_desirable_weight": 0.2,
                "datasets": [{"path": "a", "type": "chat_template"}, {"path": "b", "type": "chatml.intel"}],
            }
        )


@pytest.mark.parametrize(
    "key",
    [
        *("trl", "vllm", "dpo_label_smoothing", "orpo_alpha", "simpo_gamma", "cpo_alpha", "rpo_alpha", "ebft"),
        *("max_prompt_len", "precompute_ref_log_probs", "rl_adapter_ref_model"),
    ],
)
def test_what_another_method_has_left_is_named(key: str) -> None:
    more = "bounds a prompt with its answer" if key == "max_prompt_len" else ""
    with pytest.raises(ValueError, match=f"`{key}:.*another method.*{more}"):
        refuse_leftovers({key: {"x": 1} if key in ("ebft", "trl", "vllm") else 0.1})
    refuse_leftovers({key: None})


@pytest.mark.parametrize(
    "entry",
    [
        {"type": "llama3.ultra"},
        {"type": "ebft_reasoning.transform"},
        {"type": "bradley_terry.chat_template"},
        {"type": "chat_template.default", "field_chosen": "chosen", "field_rejected": "rejected"},
        {"type": {"field_prompt": "prompt", "field_chosen": "good"}},
    ],
)
@pytest.mark.parametrize("name", ["datasets", "test_datasets"])
def test_preference_data_is_refused(entry: dict, name: str) -> None:
    with pytest.raises(ValueError, match=rf"`{name}\[0\]` \(x\) holds preferences"):
        refuse_leftovers({name: [{"path": "x", **entry}]})


@pytest.mark.parametrize("type_", ["chat_template", "alpaca", None, {"field_instruction": "q", "field_output": "a"}])
def test_sft_data_passes(type_: Any) -> None:
    refuse_leftovers({"datasets": [{"path": "x", "type": type_, "field_messages": "chosen"}]})


@pytest.mark.parametrize(
    ("key", "value", "instead"),
    [
        ("load_best_model_at_end", True, False),
        ("metric_for_best_model", "eval_loss", None),
        ("early_stopping_patience", 3, None),
        ("save_strategy", "best", "epoch"),
        ("neftune_noise_alpha", 5, None),
        ("noisy_embedding_alpha", 5.0, None),
        ("nvfp4_merge_aware_start_step", 0.5, None),
        ("use_dft", True, None),
        ("use_eaft", True, None),
        ("train_on_inputs", True, False),
        ("batch_flattening", "auto", False),
        ("include_tkps", True, False),
        ("deepcompile", True, False),
        ("torch_compile_regional", True, False),
        ("dataloader_drop_last", True, False),
    ],
)
def test_what_has_another_meaning_is_set_aside_and_said(key: str, value: Any, instead: Any) -> None:
    data = {key: value, "learning_rate": 1e-6}
    (line,) = set_aside(data)
    assert line.startswith(f"`{key}: {value}`") and data == {key: instead, "learning_rate": 1e-6}
    assert claim(**{key: value})[key] == instead
    assert set_aside(data) == []  # the host validates twice


def test_quantisation_that_begins_later_begins_at_once() -> None:
    """Else the opponent of an iteration in which it began would be another model than the policy's start."""
    qat = {"weight_dtype": "int4", "fake_quant_after_n_steps": 1000}
    data = {"rl": "spin", "qat": qat}
    [line] = set_aside(data)
    assert line.startswith("`qat.fake_quant_after_n_steps: 1000` has no effect")
    assert data["qat"] == {**qat, "fake_quant_after_n_steps": None} and qat["fake_quant_after_n_steps"] == 1000
    assert set_aside(data) == set_aside({"qat": {"fake_quant_after_n_steps": 0}}) == []


def test_every_key_that_is_set_aside_is_tested() -> None:
    marks = test_what_has_another_meaning_is_set_aside_and_said.pytestmark
    assert {row[0] for row in marks[0].args[1]} == {key for key, *_ in SET_ASIDE}


def test_fsdp_without_a_version_becomes_fsdp2() -> None:
    """As in the host's older examples, which its version 0.19 would run by FSDP1."""
    data: dict = {"fsdp": ["full_shard", "auto_wrap"], "fsdp_config": {"fsdp_sharding_strategy": "FULL_SHARD"}}
    assert "`fsdp_version: 2` is taken" in set_aside(data)[0]
    assert data["fsdp_version"] == 2
    assert data["fsdp_config"] == {"fsdp_version": 2, "reshard_after_forward": True}
    assert set_aside(data) == []
    data = {"fsdp_config": {"sharding_strategy": "SHARD_GRAD_OP", "forward_prefetch": False, "offload_params": True}}
    set_aside(data)
    assert data["fsdp_config"] == {"fsdp_version": 2, "reshard_after_forward": False, "offload_params": True}
    data = {"fsdp_config": {"fsdp_cpu_ram_efficient_loading": True}, "load_in_4bit": True}
    assert "`cpu_ram_efficient_loading: false`" in set_aside(data)[0]
    assert data["fsdp_config"] == {"fsdp_version": 2, "cpu_ram_efficient_loading": False}
    assert set_aside({"fsdp": None, "fsdp_config": None}) == set_aside({"fsdp": [], "fsdp_config": {}}) == []


@pytest.mark.parametrize(
    "config",
    [
        {"fsdp_config": {"sharding_strategy": "HYBRID_SHARD"}},
        {"fsdp_config": {"fsdp_forward_prefetch": True}},
        {"fsdp": ["hybrid_shard_zero2", "auto_wrap"], "fsdp_config": {"fsdp_offload_params": True}},
        {"fsdp": "no_shard auto_wrap"},
    ],
)
def test_what_fsdp2_has_no_word_for_is_not_lifted(config: dict) -> None:
    data = deepcopy(config)
    assert set_aside(data) == [] and data == config


@pytest.mark.parametrize("optimizer", ["galore_adamw_layerwise", "lomo", "adalomo", "schedule_free_sgd"])
def test_optimizers_that_cannot_restart(optimizer: str) -> None:
    with pytest.raises(ValidationError, match="`optimizer: "):
        claim(optimizer=optimizer)


@pytest.mark.parametrize(
    "config",
    [{"fsdp_version": 1, "fsdp_config": {"x": 1}}, {"fsdp_config": {"fsdp_version": 1}}, {"fsdp_version": "1"}],
)
def test_fsdp1_is_refused(config: dict) -> None:
    with pytest.raises(ValidationError, match="set `fsdp_version: 2`"):
        claim(**config)


def test_fsdp1_by_default_is_refused_where_the_host_still_has_it() -> None:
    """Axolotl 0.19 takes version 1 where none is given, later hosts 2; what FSDP2 has no word for is not lifted."""
    assert claim(fsdp_config={"sharding_strategy": "NO_SHARD"})["spin"]["active"]
    with pytest.raises(ValueError, match="which this host takes where none is given"):
        refuse_loaded({"fsdp_config": {"x": 1}, "fsdp_version": None}, SpinConfig(), [], needs_whole=True)
    refuse_loaded({"fsdp_config": {"x": 1}, "fsdp_version": 2}, SpinConfig(), [], needs_whole=True)


NVME = {"deepspeed": {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "nvme"}}}}
GROKFAST = {"plugins": ["axolotl.integrations.grokfast.GrokfastPlugin"]}


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        ({"deepspeed": {"scheduler": {"type": "WarmupLR"}}}, "scheduler"),
        ({"deepspeed": {"zero_optimization": {"stage": 3}}}, "gather_16bit_weights_on_model_save: true"),
        (
            {"deepspeed": {"tensor_parallel": {"autotp_size": 2}}},
            "`tensor_parallel.autotp_size: 2`.*its ranks make each forward",
        ),
        ({"deepspeed": {"sequence_parallel_size": 2}}, "`sequence_parallel_size: 2`.*not split over ranks"),
        ({"tiled_mlp": True, "world_size": 2}, "set `tiled_mlp_num_shards`"),
        (NVME, "`nvme`.*set `spin.restart_optimizer: false`"),
        (GROKFAST, "GrokfastPlugin, whose average of gradients.*set `spin.restart_optimizer: false`"),
    ],
)
def test_refusals_that_need_the_loaded_config(cfg: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        refuse_loaded(cfg, SpinConfig(), [], needs_whole=True)


@pytest.mark.parametrize("cfg", [NVME, GROKFAST, {"tiled_mlp": True, "tiled_mlp_num_shards": 2, "world_size": 2}])
def test_what_does_not_restart_may_stay_where_nothing_restarts(cfg: dict) -> None:
    for settings in (SpinConfig(restart_optimizer=False), SpinConfig(iterations=1)):
        refuse_loaded(cfg, settings, [], needs_whole=False)


def test_apples_gpus_are_refused() -> None:
    """They have no float64, in which log-probs are summed and tokens drawn."""
    with pytest.raises(ValueError, match="ACCELERATE_USE_CPU=true"):
        refuse_devices({}, 0, "mps")


def test_one_process_takes_one_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The host would spread the model over all that the process sees; `preprocess` and `plan` compute nothing there."""
    for cfg, seen in (({"world_size": 1}, 1), ({"world_size": 2}, 2), ({"world_size": 1, "deepspeed": {"x": 1}}, 2)):
        refuse_devices(cfg, seen)
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    load_datasets = SpinPlugin.load_datasets

    def seeing_two(*asked: Any, **how: Any) -> Any:  # before that the host asks more of the GPUs that it sees
        with pytest.MonkeyPatch.context() as there:
            there.setattr(torch.cuda, "device_count", lambda: 2)
            return load_datasets(*asked, **how)

    monkeypatch.setattr(SpinPlugin, "load_datasets", seeing_two)
    with pytest.raises(ValueError, match=r"sees 2 GPUs.*CUDA_VISIBLE_DEVICES=0"):
        rows.load(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert rows.load(tmp_path)[0] is not None


@pytest.mark.parametrize(
    ("zero", "shards"),
    [
        ({"stage": 3}, True),
        ({"stage": 3, "gather_16bit_weights_on_model_save": True}, False),
        ({"stage": 3, "stage3_gather_16bit_weights_on_model_save": True}, False),
        ({"stage": 3, "gather_16bit_weights_on_model_save": False}, True),
        ({"stage": 2}, False),
        (None, False),
    ],
)
def test_zero3_is_read_as_deepspeed_reads_it(zero: dict | None, shards: bool) -> None:
    assert saves_sharded({"zero_optimization": zero}) is shards
    if zero:
        from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

        assert (zero["stage"] == 3 and not DeepSpeedZeroConfig(**zero).gather_16bit_weights_on_model_save) is shards
    assert (describe_shards({"deepspeed": {"zero_optimization": zero}}) is not None) is shards
    assert describe_shards({"deepspeed": {"zero_optimization": zero}, "adapter": "lora"}) is None


def test_another_plugins_trainer_is_refused() -> None:
    with pytest.raises(ValueError, match=r"kd\.KDPlugin"):
        refuse_loaded({}, SpinConfig(), ["kd.KDPlugin"], needs_whole=True)
    refuse_loaded({"deepspeed": {"zero_optimization": {"stage": 3}}}, SpinConfig(), [], needs_whole=False)
