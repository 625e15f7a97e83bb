"""The host contract: every symbol and behaviour of the host that this package relies on, asserted on the installed host.

The host is Axolotl with what it pins: transformers, accelerate, datasets, PEFT, torch. Where hosts differ, the test says
in which versions. A failing test names what a new host changed; its docstring says what of ours depends on it.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib
import inspect
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatchcase
from importlib.metadata import entry_points, requires, version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import architectures
import dill
import host
import pictured
import pytest
import tiny
import torch
import yaml
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, broadcast_object_list
from axolotl.cli.args import TrainerCliArgs
from axolotl.cli.config import load_cfg
from axolotl.cli.train import do_train
from axolotl.common.datasets import TrainDatasetMeta, load_datasets
from axolotl.core.builders.base import TrainerBuilderBase
from axolotl.core.trainers.base import AxolotlTrainer
from axolotl.core.training_args import AxolotlTrainingArguments
from axolotl.integrations.base import BasePlugin, PluginManager
from axolotl.integrations.config import merge_input_args
from axolotl.loaders import ModelLoader, load_processor, load_tokenizer
from axolotl.prompt_strategies import load as load_strategy
from axolotl.train import setup_signal_handler
from axolotl.utils.chat_templates import get_chat_template
from axolotl.utils.collators.mm_chat import MultiModalChatDataCollator
from axolotl.utils.config import prepare_plugins, validate_config
from axolotl.utils.data import prepare_datasets
from axolotl.utils.data.wrappers import get_dataset_wrapper
from axolotl.utils.dict import DictDefault
from axolotl.utils.schemas.config import AxolotlInputConfig
from axolotl.utils.tee import close_debug_log
from axolotl.utils.train import determine_last_checkpoint
from datasets import Dataset, Features, List, Value
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version
from peft import LoraConfig, get_peft_model
from rows import PAIR
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    MixtralForCausalLM,
    Trainer,
    TrainerControl,
    TrainerState,
)
from transformers.trainer_callback import DefaultFlowCallback, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy, SchedulerType
from transformers.training_args import OptimizerNames

from axolotl_spin.args import SpinArgs, spin_config
from axolotl_spin.callbacks import SaveAtIterationEnd
from axolotl_spin.compat import FIRST_UNSUPPORTED, OLDEST, PairTrainer, check_host_version, empty_model
from axolotl_spin.data.pairs import PairDataset, read_pairs
from axolotl_spin.data.prompts import prompts_of_row
from axolotl_spin.game.schedule import IterationSchedule, learning_rate_table, restart_optimizer
from axolotl_spin.generation.adapter import adapter_of
from axolotl_spin.generation.transformers import _generation_config
from axolotl_spin.plugin import SpinPlugin
from axolotl_spin.refusals import REFUSED
from axolotl_spin.run.checkpoints import read_checkpoint
from axolotl_spin.run.compared import NOT_COMPARED, host_defaults, host_values, reasons
from axolotl_spin.run.identity import _GROUP_RATES, _PLANNED
from axolotl_spin.run.pictures import host_collator
from axolotl_spin.run.plan import make_plan
from axolotl_spin.run.plan import warmup_steps as plan_warmup_steps
from axolotl_spin.trainer import SpinTrainer
from axolotl_spin.training.layouts import PairCollator
from axolotl_spin.training.logprobs import completion_logps
from axolotl_spin.training.masks import shared_block_mask
from axolotl_spin.training.noise import disable_dropout

SPIN = "axolotl_spin.SpinPlugin"
HOST = Version(version("axolotl"))
REGISTERS_BY_ENTRY_POINT = HOST.release >= (0, 21)

# tokens of the tiny tokenizer
USER, ASSISTANT, END, UNKNOWN = 4, 5, 6, 1
W1, W2, W3 = 8, 9, 10


@pytest.fixture(scope="module", autouse=True)
def process_as_before() -> Iterator[None]:
    """Undoes what the host's commands leave in a process: signal handler, log file, distributed state."""
    threads, handler = torch.get_num_threads(), signal.getsignal(signal.SIGINT)
    torch.set_num_threads(1)
    yield
    close_debug_log()
    signal.signal(signal.SIGINT, handler)
    torch.set_num_threads(threads)
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    """Restores the environment; `monkeypatch` cannot, since `Dataset.map` puts another object in place of `os.environ`."""
    kept = dict(os.environ)
    os.environ["AXOLOTL_TEE_STDOUT"] = "0"
    yield
    os.environ.clear()
    os.environ.update(kept)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds the model, the data and what the host prepared from it, for all tests: it is prepared only once."""
    return tmp_path_factory.mktemp("host")


def settings(folder: Path, **changes: Any) -> dict[str, Any]:
    """Returns a config over eight conversations; one process prepares them."""
    data = folder / "conversations.jsonl"
    if not data.exists():
        tiny.conversations(data, 8)
    datasets = [{"path": str(data), "ds_type": "json", "type": "chat_template"}]
    return host.config(folder, **{"datasets": datasets, "dataset_num_proc": 1, **changes})


def sft(folder: Path, **changes: Any) -> dict[str, Any]:
    """Returns the same config without self-play, as a user without this package has it."""
    return settings(folder, **{"rl": None, "spin": None, "plugins": None, **changes})


def loaded(config: dict[str, Any]) -> DictDefault:
    """Reads a config as every command of the host does, in a host that holds no plugin of an earlier test."""
    PluginManager.get_instance().plugins.clear()
    path = Path(config["base_model"]).with_name("config.yml")
    path.write_text(yaml.safe_dump(config))
    return load_cfg(str(path))


def validated(config: dict[str, Any]) -> DictDefault:
    """Validates a config against the host's schema with plugins merged in; nothing else of the host runs."""
    PluginManager.get_instance().plugins.clear()
    cfg = DictDefault(config)
    prepare_plugins(cfg)
    return validate_config(cfg)


def registered() -> list[str]:
    """Returns the names under which the host has instances of our plugin."""
    plugins = PluginManager.get_instance().plugins
    return [name for name, plugin in plugins.items() if isinstance(plugin, SpinPlugin)]


def parameters(function: Any) -> list[str]:
    return list(inspect.signature(function).parameters)


# -- what is installed ------------------------------------------------------------------------------------------------


def test_installed_host_is_supported_and_the_bounds_agree() -> None:
    """The dependency in the package's metadata and the check at run time (`compat.py`) name the same versions."""
    check_host_version()
    needed = next(r for r in map(Requirement, requires("axolotl-spin") or []) if r.name == "axolotl" and not r.marker)
    assert needed.specifier == SpecifierSet(f">={OLDEST},<{FIRST_UNSUPPORTED}")


def test_leaves_import_nothing_heavy(tmp_path: Path) -> None:
    """The host imports `args` for every config of an environment and `cli` for `axolotl --help`."""
    code = (
        "import json, sys\n"
        "import axolotl_spin, axolotl_spin.args, axolotl_spin.refusals, axolotl_spin.run.plan\n"
        "import axolotl_spin.disk.directory, axolotl_spin.data.prompts, axolotl_spin.generation.chunks, axolotl_spin.cli\n"
        "print(json.dumps([m for m in ('torch', 'transformers', 'axolotl', 'datasets', 'pyarrow') if m in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr[-4000:]
    assert json.loads(done.stdout) == []


def ours() -> set[str]:
    """Returns the modules of this package that are imported."""
    return {name for name in sys.modules if name.partition(".")[0] == "axolotl_spin"}


def test_every_hook_is_inert_without_rl_spin() -> None:
    """Host 0.21 registers the plugin in every environment that has it: other configs must not notice."""
    kept = {name: sys.modules.pop(name) for name in ours()}
    try:
        plugin = importlib.import_module("axolotl_spin.plugin").SpinPlugin()
        imported, answers = ours(), {}
        plugin.register(DictDefault({"rl": "dpo"}))
        for name, hook in inspect.getmembers(plugin, inspect.ismethod):
            if not name.startswith("_") and hasattr(BasePlugin, name):
                given = dict.fromkeys(parameters(hook))
                answers[name] = hook(**{**given, **({"cfg": DictDefault({"rl": "dpo"})} if "cfg" in given else {})})
        afterwards = ours()
    finally:
        for name in ours():
            del sys.modules[name]
        sys.modules.update(kept)
    light = (
        "args",
        "keys",
        "launched",
        "plugin",
        "refusals",
        "set_aside",
        "settings",
        "settings.block",
        "settings.generation",
        "settings.spin",
    )
    assert imported == {"axolotl_spin", *(f"axolotl_spin.{name}" for name in light)}
    assert afterwards == imported
    assert len(answers) > 20
    assert {name: answer for name, answer in answers.items() if answer not in (None, [], {})} == {}


@pytest.mark.parametrize("config", [{"rl": "spin"}, {"spin": {"beta": 1.0}}, {"rl": "dpo", "spin": {}}])
def test_a_config_that_names_spin_gets_its_schema(config: dict[str, Any]) -> None:
    """A block without `rl: spin` as well: its error comes from the schema."""
    plugin = SpinPlugin()
    plugin.register(DictDefault({}))
    assert plugin.get_input_args() is None
    plugin.register(DictDefault(config))
    assert plugin.get_input_args() == "axolotl_spin.args.SpinArgs"


# -- plugin and commands ----------------------------------------------------------------------------------------------


HOOKS = {
    "register": ["cfg"],
    "get_input_args": [],
    "load_datasets": ["cfg", "preprocess"],
    "get_trainer_cls": ["cfg"],
    "get_training_args": ["cfg"],
    "add_callbacks_post_trainer": ["cfg", "trainer"],
    "pre_model_load": ["cfg"],
    "post_trainer_create": ["cfg", "trainer"],
    "post_train": ["cfg", "model"],
    "post_train_unload": ["cfg"],
}


@pytest.mark.parametrize("hook", HOOKS)
def test_hook_exists_with_these_parameters(hook: str) -> None:
    """The host calls some hooks by keyword, so ours must name them alike; one that was renamed would never be called."""
    assert parameters(getattr(BasePlugin(), hook)) == parameters(getattr(SpinPlugin(), hook)) == HOOKS[hook]


def test_hooks_that_we_override_are_those() -> None:
    assert {name for name in vars(SpinPlugin) if not name.startswith("_")} == set(HOOKS)


def test_plugin_is_registered_once_under_its_dotted_name(folder: Path) -> None:
    """`plugins:` is what 0.19 and 0.20 need; on 0.21 it may stay in the config without registering a second instance.

    `axolotl spin plan` and `load_datasets` look the instance up in `PluginManager.plugins`.
    """
    assert [point.value for point in entry_points(group="axolotl.plugins", name="spin")] == ["axolotl_spin:SpinPlugin"]
    assert validated(settings(folder, plugins=[SPIN])).spin.active
    assert registered() == [SPIN]
    if REGISTERS_BY_ENTRY_POINT:
        from axolotl.integrations.base import get_builtin_plugins

        assert SPIN in get_builtin_plugins()
        assert validated(settings(folder, plugins=None)).spin.active
        assert registered() == [SPIN]
    else:
        with pytest.raises(ValueError, match="rl"):
            validated(settings(folder, plugins=None))
        assert registered() == []


def test_another_plugins_trainer_is_seen(folder: Path) -> None:
    """The first plugin that returns a trainer class wins, so `load_datasets` refuses a second one by name.

    From 0.21 on plugins found by their entry point stand before those of `plugins:`.
    """
    cfg = validated(settings(folder, plugins=[f"{__name__}.OtherTrainer", SPIN]))
    plugins = PluginManager.get_instance()
    assert plugins.get_trainer_cls(cfg) is (SpinTrainer if REGISTERS_BY_ENTRY_POINT else AxolotlTrainer)
    assert plugins.plugins[SPIN]._other_trainers(cfg) == [f"{__name__}.OtherTrainer"]


class OtherTrainer(BasePlugin):
    """Brings a trainer for every config."""

    def get_trainer_cls(self, cfg: Any) -> type:
        return AxolotlTrainer


def test_command_group_serves_axolotl_spin() -> None:
    """`axolotl spin plan` and `axolotl spin table` come through the entry-point group `axolotl.cli_commands`."""
    import click
    from axolotl.cli.main import cli
    from click.testing import CliRunner

    context = click.Context(cli)
    assert "spin" in cli.list_commands(context)
    result = CliRunner().invoke(cli, ["spin", "--help"])
    assert result.exit_code == 0, result.output
    assert "plan" in result.output and "table" in result.output


# -- config -----------------------------------------------------------------------------------------------------------


def test_rl_spin_becomes_sft_with_an_active_block(folder: Path) -> None:
    """Our before-validator runs ahead of the host's checks of `rl`, which do not know the value."""
    cfg = loaded(settings(folder, spin={"iterations": 2, "beta": [0.1, 5]}))
    assert cfg.rl is None
    found = spin_config(cfg)
    assert found is not None and found.active
    assert (found.iterations, found.betas(), found.history) == (2, [0.1, 5.0], 1)
    assert PluginManager.get_instance().get_trainer_cls(cfg) is SpinTrainer
    assert Path(cfg.axolotl_config_path) == folder / "config.yml"


def test_validating_twice_keeps_the_claim(folder: Path) -> None:
    """The host validates again on its Ray workers, where `rl` is already None."""
    once = validated(settings(folder))
    twice = validated(once.to_dict())
    assert twice.rl is None and twice.spin == once.spin and spin_config(twice) == spin_config(once)


def test_merged_schema_has_the_hosts_field_rl_and_our_validator() -> None:
    """A plugin cannot add a value to `rl` (the host's class comes first), hence the claim before validation."""
    PluginManager.get_instance().plugins[SPIN] = SpinPlugin()
    for merged in merge_input_args():
        bases = merged.__mro__
        assert bases.index(AxolotlInputConfig) < bases.index(SpinArgs)
        assert merged.model_fields["rl"].annotation == AxolotlInputConfig.model_fields["rl"].annotation
        assert merged.model_fields["spin"].annotation == SpinArgs.model_fields["spin"].annotation


@pytest.mark.parametrize("rl", [None, "kto"])
def test_other_configs_are_untouched(folder: Path, rl: str | None) -> None:
    cfg = validated(sft(folder, rl=rl, plugins=[SPIN], remove_unused_columns=False))
    assert cfg.rl == rl and "spin" not in cfg and spin_config(cfg) is None
    assert PluginManager.get_instance().get_trainer_cls(cfg) is None


def test_unknown_keys_raise_under_spin_and_vanish_elsewhere(folder: Path) -> None:
    """The host drops keys that it does not know, so the blocks of ours must be the ones that forbid."""
    with pytest.raises(ValueError, match=r"spin\.itertions"):
        validated(settings(folder, spin={"itertions": 2}))
    with pytest.raises(ValueError, match=r"spin\.generation\.max_tokens"):
        validated(settings(folder, spin={"generation": {"max_tokens": 2}}))
    assert "itertions" not in validated(settings(folder, itertions=2))


READ_KEYS = (
    "base_model", "rl", "datasets", "micro_batch_size", "gradient_accumulation_steps", "num_epochs", "learning_rate",
    "max_steps", "warmup_steps", "warmup_ratio", "output_dir", "sequence_len", "seed", "world_size", "eot_tokens",
    "curriculum_sampling", "adapter", "axolotl_config_path", "device_map", "saves_per_epoch", "save_steps",
    "evals_per_epoch", "eval_steps", "deepspeed", "chat_template", "chat_template_jinja", "fsdp_version", "fsdp_config",
    "revision_of_model", "chat_template_kwargs", "test_datasets", "lora_model_dir", "load_in_4bit", "load_in_8bit",
    "bnb_config_kwargs", "resize_token_embeddings_to_32x", "shrink_embeddings",
)  # fmt: skip


def test_host_has_every_key_that_we_read() -> None:
    """A renamed key would read as None."""
    assert sorted({*READ_KEYS, *_PLANNED, *_GROUP_RATES} - set(AxolotlInputConfig.model_fields)) == []


@pytest.mark.parametrize(
    "changes",
    [
        {"lora_rank_pattern": {"q_proj": 64}, "lora_alpha_pattern": {"q_proj": 4}, "peft_use_dora": True},
        {"peft": {"loftq_config": {"loftq_bits": 4}}, "peft_layer_replication": [[0, 1], [0, 2]]},
        {"peft": {"loftq_config": {"loftq_bits": 4}}, "peft_init_lora_weights": "gaussian"},
        {"peft_trainable_token_indices": [3], "lora_modules_to_save": ["lm_head"]},
        {"lora_target_parameters": ["mlp.gate_proj.weight"], "lora_dropout": 0.0},
    ],
)
def test_an_adapter_is_what_the_host_tells_peft_of_it(folder: Path, changes: dict[str, Any]) -> None:
    """What vLLM can serve is judged by these settings (`generation/adapter.py`)."""
    from axolotl.loaders.adapter import load_lora

    cfg = validated(settings(folder, **{**host.LORA, "lora_target_modules": ["q_proj"], **changes}))
    cfg.lora_target_linear = None
    _, told = load_lora(tiny.model(47), cfg, config_only=True)
    for name, value in adapter_of(cfg).settings.items():
        theirs = getattr(told, name)
        if name == "init_lora_weights":
            theirs = None if theirs is True else theirs  # PEFT's default
        plain = DictDefault({"value": value}).to_dict()["value"]
        assert (plain or None) == ((sorted(theirs) if isinstance(theirs, set) else theirs) or None), name


def test_every_key_of_the_host_is_compared_or_has_one_reason_why_not() -> None:
    """What a new host brings is compared; what is listed must be some host's key, under one reason."""
    fields = set(AxolotlInputConfig.model_fields)
    told = {key: reasons(key) for key in fields}
    assert {key: why for key, why in told.items() if len(why) > 1} == {}
    compared = {key for key, why in told.items() if not why}
    assert {"base_model", "seed", "optimizer", "bf16", "rope_scaling", "special_tokens", "eot_tokens"} <= compared
    # of another host, of its plugins, or put into the config by the host itself
    elsewhere = {
        *(
            "fsdp",
            "capabilities",
            "env_capabilities",
            "is_multimodal",
            "model_config_type*",
            "torch_dtype",
            "expert_parallel_*",
            "spin",
        ),
        *("attn_decontaminates_packing", "attn_needs_dtype_cast", "attn_supports_packing", "attn_uses_flash_lib"),
        *("processor_config", "full_determinism", "sync_profiler_*", "logging_nan_inf_filter", "nf4_backend", "export"),
        *("fa_varlen_kwargs_in_collator", "use_swanlab", "swanlab_*"),
    }
    named = {name for group in NOT_COMPARED.values() for name in group}
    assert {name for name in named if not any(fnmatchcase(key, name) for key in fields)} <= elsewhere


def test_of_what_the_host_adds_to_a_config_nothing_is_compared(cfg: DictDefault, folder: Path) -> None:
    """Devices, ranks, capabilities: on another machine they are others."""
    defaults = host_defaults()
    kept = {key for key, value in host_values(cfg).items() if not reasons(key) and value != defaults.get(key)}
    assert kept - set(settings(folder)) == set()


def test_host_has_every_key_that_we_refuse() -> None:
    """A refusal of a renamed key would never fire again.

    `expert_parallel_size` belongs to one of its plugins.
    """
    absent = {key for key, _, _ in REFUSED} - set(AxolotlInputConfig.model_fields)
    newer, older = {"use_dft": (0, 20), "balance_labels": (0, 21), "diffusion_lm": (0, 21)}, {"fsdp": (0, 20)}
    absent -= {key for key, since in newer.items() if HOST.release < since}
    absent -= {key for key, until in older.items() if HOST.release >= until}
    assert absent == {"expert_parallel_size"}


def test_fsdp_version_that_the_host_takes_where_none_is_given(folder: Path) -> None:
    """0.19 means FSDP1, which we refuse; from 0.20 on only FSDP2 is left and needs no key."""
    cfg = validated(sft(folder, fsdp_config={"auto_wrap_policy": "TRANSFORMER_BASED_WRAP"}))
    assert cfg.fsdp_version == (2 if HOST.release >= (0, 20) else 1)


def test_names_of_optimizers_and_schedulers_that_we_refuse() -> None:
    """The refusals match by prefix or part of the name; these are all that they match today."""
    tests = {key: [refused for name, refused, _ in REFUSED if name == key] for key in ("optimizer", "lr_scheduler")}
    optimizers = {name.value for name in OptimizerNames if any(refused(name.value) for refused in tests["optimizer"])}
    assert optimizers == {
        "schedule_free_radam", "schedule_free_adamw", "schedule_free_sgd", "lomo", "adalomo", "apollo_adamw_layerwise",
        "galore_adamw_layerwise", "galore_adamw_8bit_layerwise", "galore_adafactor_layerwise",
    }  # fmt: skip
    schedulers = {name.value for name in SchedulerType if any(refused(name.value) for refused in tests["lr_scheduler"])}
    assert schedulers == {"reduce_lr_on_plateau", "greedy"}


def test_saves_and_evaluations_per_epoch_become_fractions_of_the_run(folder: Path) -> None:
    """`get_training_args` spreads them over the iterations; the host divides by `num_epochs` alone."""
    cfg = loaded(settings(folder, num_epochs=2, saves_per_epoch=2, evals_per_epoch=4, val_set_size=2))
    assert (cfg.save_steps, cfg.eval_steps) == (1 / 4, 1 / 8)
    plugins = PluginManager.get_instance()
    meta = plugins.load_datasets(cfg)
    arguments = plugins.get_training_args(cfg)
    assert (arguments["save_steps"], arguments["eval_steps"]) == (1 / 8, 1 / 16)
    assert (arguments["max_steps"], arguments["num_train_epochs"]) == (meta.total_num_steps, 4)


def test_once_in_a_run_that_ends_within_its_first_epoch_is_at_its_end(folder: Path) -> None:
    """transformers takes less than 1 for a fraction of the run, and 1 for every step."""
    cfg = loaded(settings(folder, num_epochs=2, saves_per_epoch=1, evals_per_epoch=1, val_set_size=2, max_steps=2))
    assert cfg.eval_steps == 0.5
    plugins = PluginManager.get_instance()
    plugins.load_datasets(cfg)
    arguments = plugins.get_training_args(cfg)
    assert (arguments["save_steps"], arguments["eval_steps"], arguments["max_steps"]) == (2, 2, 2)
    state = TrainerState()
    state.compute_steps(SimpleNamespace(logging_steps=1, eval_steps=1.0, save_steps=0.5), 2)
    assert (state.eval_steps, state.save_steps) == (1, 1)


def test_ranks_and_device_map(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plan counts ranks by the launcher's variable; without an accelerator the host's device map names none."""
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda *devices: True)  # 0.20 asks, also without a driver
    os.environ.update(WORLD_SIZE="2", LOCAL_RANK="1")
    cfg = loaded(settings(folder))
    assert (cfg.world_size, cfg.device_map) == (2, {"": 1})
    plugins = PluginManager.get_instance()
    plugins.load_datasets(cfg, preprocess=True)
    assert plugins.plugins[SPIN].run.plan.global_batch == 2 * 2 * 2
    assert cfg.device_map is None or torch.cuda.is_available()


def test_deepspeeds_launcher_has_a_variable_of_its_own_for_the_ranks_of_a_node() -> None:
    """Where it starts them no other says how many a node has (`ranks_here`)."""
    from deepspeed.launcher import launch

    source = inspect.getsource(launch.main)
    assert 'current_env["LOCAL_SIZE"] = str(num_local_procs)' in source and "LOCAL_WORLD_SIZE" not in source


def test_the_host_ends_a_process_at_ctrl_c_without_its_process_group() -> None:
    """So `Peers` keeps rank and count, and a rank that ends by this is not called failed."""
    source = inspect.getsource(setup_signal_handler)
    assert source.index("cleanup_distributed()") < source.index("sys.exit(0)") and "signal.SIGINT" in source


@pytest.mark.parametrize("steps", [1, 40, 200, 5000])
@pytest.mark.parametrize(
    "keys",
    [{}, {"warmup_steps": 0}, {"warmup_steps": 1}, {"warmup_steps": 7}, {"warmup_ratio": 0.0}, {"warmup_ratio": 0.1}],
)
def test_warmup_rule_of_the_host(keys: dict[str, Any], steps: int) -> None:
    """`plan.warmup_steps` applies the host's rule to an iteration; it also keeps the warmup within the iteration."""
    arguments: dict[str, Any] = {}
    TrainerBuilderBase._configure_warmup_and_logging(SimpleNamespace(cfg=DictDefault(keys)), steps, arguments)
    planned = plan_warmup_steps(steps, **{"warmup_steps": None, "warmup_ratio": None, **keys})
    assert planned == min(arguments["warmup_steps"], steps)


# -- data -------------------------------------------------------------------------------------------------------------


def test_prepare_datasets_stops_before_counting_steps(folder: Path) -> None:
    """`compat.rows_only` sets the variable of `axolotl preprocess`, so that no SFT run's steps are estimated."""
    cfg = loaded(sft(folder, val_set_size=2))
    tokenizer = load_tokenizer(cfg)
    train, evaluation, steps, _ = prepare_datasets(cfg, tokenizer)
    assert (len(train), len(evaluation), steps) == (6, 2, 2)
    os.environ["AXOLOTL_IS_PREPROCESS"] = "1"
    again, held_out, none, _ = prepare_datasets(cfg, tokenizer)
    assert none == -1
    assert again[:] == train[:] and held_out[:] == evaluation[:]
    assert {"input_ids", "labels"} <= set(train.column_names)


def test_prepared_rows_and_their_cache_are_those_of_sft(folder: Path, tmp_path: Path) -> None:
    """Adding `rl: spin` to a config tokenises nothing anew: the host's cache knows neither `rl` nor `spin`."""
    here = {"dataset_prepared_path": str(tmp_path)}
    plain = load_datasets(cfg=loaded(sft(folder, **here)), cli_args=TrainerCliArgs())
    caches = sorted(path.name for path in tmp_path.iterdir() if path.is_dir())
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / caches[0]).iterdir()}
    meta = PluginManager.get_instance().load_datasets(loaded(settings(folder, **here)))
    assert isinstance(meta, TrainDatasetMeta) and isinstance(plain, TrainDatasetMeta)
    assert [field.name for field in dataclasses.fields(meta)] == ["train_dataset", "eval_dataset", "total_num_steps"]
    assert len(caches) == 1
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == caches
    assert {path: path.stat().st_mtime_ns for path in written} == written
    assert meta.train_dataset[:] == plain.train_dataset[:]
    assert meta.total_num_steps == 2 + 4  # iteration 1 trains on iteration 0's pairs again


def test_prepared_rows_are_taken_as_they_are_until_they_are_prepared_anew(folder: Path, tmp_path: Path) -> None:
    """What `row_cache.PREPARE_AGAIN` says: the host sees neither a changed file nor `excess_length_strategy`, and
    `axolotl preprocess`, which sets `is_preprocess`, writes the rows again."""
    data = tiny.conversations(tmp_path / "data.jsonl", 8)
    entries = [{"path": str(data), "ds_type": "json", "type": "chat_template"}]
    keys = {"datasets": entries, "dataset_prepared_path": str(tmp_path / "prepared"), "sequence_len": 9}
    cut, dropped = (loaded(sft(folder, **keys, excess_length_strategy=way)) for way in ("truncate", "drop"))
    tokenizer = load_tokenizer(cut)
    os.environ["AXOLOTL_IS_PREPROCESS"] = "1"

    def rows(cfg: DictDefault) -> list[list[int]]:
        return prepare_datasets(cfg, tokenizer)[0]["input_ids"][:]

    first = rows(cut)
    assert max(len(row) for row in first) == 9 and len(first) == 8
    tiny.conversations(data, 40, seed=1)
    assert rows(dropped) == first
    dropped.is_preprocess = True
    anew = rows(dropped)
    assert 0 < len(anew) < 40 and anew[0] not in first
    dropped.is_preprocess = False
    assert rows(dropped) == anew


def said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


@pytest.fixture(scope="module")
def cfg(folder: Path) -> DictDefault:
    return loaded(settings(folder))


def test_chat_template_labels_are_the_answer_and_its_end_token(cfg: DictDefault) -> None:
    """The prompt strategy takes a labelled span as the answer: the generation header must stay outside, the end token
    inside, and what the chat template renders for generation must be what stands before."""
    tokenizer = load_tokenizer(cfg)
    messages = [said("user", "w1 w2"), said("assistant", "w3")]
    row = load_strategy("chat_template", tokenizer, cfg, cfg.datasets[0]).tokenize_prompt({"messages": messages})
    assert row["input_ids"] == [USER, W1, W2, END, ASSISTANT, W3, END]
    assert row["labels"] == [-100] * 5 + [W3, END]
    [(prompt, answer)] = prompts_of_row(row["input_ids"], row["labels"])
    assert prompt == tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, return_dict=False)
    assert answer == [W3, END]


REAL = [
    [said("user", "w1 w2"), said("assistant", "w3")],
    [said("system", "w2"), said("user", "w1"), said("assistant", "w2"), said("user", "w3"), said("assistant", "w1")],
    [said("user", "w3"), said("assistant", "w3 w3")],
]


@pytest.mark.parametrize("template", [None, "tokenizer_default"])
def test_uclaml_type_tokenises_like_chat_template(cfg: DictDefault, template: str | None) -> None:
    """A dataset `type` with a dot is a module of ours, called with the dataset's settings; rows come in batches.

    The host copies the top-level `chat_template` only into datasets of its own types.
    """
    tokenizer = load_tokenizer(cfg)
    dataset = DictDefault({**cfg.datasets[0], "chat_template": template})
    if template is None:
        del dataset["chat_template"]
    rows = [
        {"real": REAL[0], "generated": [*REAL[0][:-1], said("assistant", "w1")]},
        {"real": REAL[1], "generated": []},
        {"real": REAL[2], "generated": None},
    ] * 6
    authors, _ = get_dataset_wrapper(
        DictDefault({**dataset, "type": "axolotl_spin.uclaml"}),
        tokenizer,
        cfg,
        "axolotl_spin.uclaml",
        Dataset.from_list(rows),
    )
    messages = Dataset.from_list([{"messages": row["real"]} for row in rows])
    plain, _ = get_dataset_wrapper(DictDefault(dataset), tokenizer, cfg, "chat_template", messages)
    assert authors[:] == plain[:]
    assert authors["input_ids"][1][:2] == [UNKNOWN, W2] and authors["labels"][0] == [-100] * 5 + [W3, END]


def test_uclaml_strategy_reaches_other_processes(cfg: DictDefault) -> None:
    """Prepared by several processes, the host's default, the function that tokenises is pickled by `datasets`."""
    strategy = load_strategy("axolotl_spin.uclaml", load_tokenizer(cfg), cfg, cfg.datasets[0])
    arrived = dill.loads(dill.dumps(strategy.tokenize_prompt))
    assert arrived({"real": REAL[0], "generated": []})["labels"] == [-100] * 5 + [W3, END]


def test_uclaml_type_refuses_rows(cfg: DictDefault) -> None:
    strategy = load_strategy("axolotl_spin.uclaml", load_tokenizer(cfg), cfg, cfg.datasets[0])
    other = [said("user", "w2"), said("assistant", "w3")]
    with pytest.raises(ValueError, match="another prompt"):
        strategy.tokenize_prompt({"real": REAL[0], "generated": other})
    with pytest.raises(ValueError, match="another prompt"):
        strategy.tokenize_prompt({"real": [REAL[0], REAL[0]], "generated": [[], other]})
    with pytest.raises(ValueError, match="role assistant"):
        strategy.tokenize_prompt({"real": REAL[0][:1], "generated": []})


def test_datasets_have_lists_of_small_integers() -> None:
    """`data.prompts.prompt_dataset` and `run.identity` read them as Arrow lists of int32."""
    rows = Dataset.from_dict({"ids": [[1, 2], []]}, features=Features({"ids": List(Value("int32"))}))
    column = next(rows.with_format("arrow").iter(batch_size=2))["ids"].combine_chunks()
    assert column.value_lengths().to_pylist() == [2, 0]
    assert column.flatten().to_numpy().dtype == "int32"


# -- a run ------------------------------------------------------------------------------------------------------------


class Recorder(BasePlugin):
    """Notes the host's calls in the order in which they come."""

    calls: list[str] = []
    trainer: Any = None

    def register(self, cfg: Any) -> None:
        self.calls.append(f"register with rl: {cfg.get('rl')}")

    def load_datasets(self, cfg: Any, preprocess: bool = False) -> None:
        self.calls.append("load_datasets")

    def get_training_args(self, cfg: Any) -> None:
        self.calls.append("get_training_args")

    def add_callbacks_post_trainer(self, cfg: Any, trainer: Any) -> list:
        self.calls.append("add_callbacks_post_trainer")
        return [Events(self.calls)]

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        self.calls.append("post_trainer_create")
        Recorder.trainer = trainer

    def post_train(self, cfg: Any, model: Any) -> None:
        self.calls.append("post_train")

    def post_train_unload(self, cfg: Any) -> None:
        self.calls.append("post_train_unload")


class Events(TrainerCallback):
    """Notes when training starts, ends an epoch, saves and stops."""

    def __init__(self, calls: list[str]):
        self.calls = calls

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.calls.append("train")

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.calls.append(f"epoch ends at {state.global_step}")

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.calls.append(f"saves at {state.global_step}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.calls.append("trained")


@pytest.fixture(scope="module")
def run(folder: Path) -> SimpleNamespace:
    """A whole run of the host's `train` command in this process: two iterations of 6 pairs, 3 micro-batches, 2 steps."""
    spin = {"iterations": 2, "history": 0, "generation": {"max_new_tokens": 2, "batch_size": 8}}
    own = {"dataloader_num_workers": 0, "plugins": [f"{__name__}.Recorder", SPIN], "output_dir": str(folder / "run")}
    config = settings(folder, **own, spin=spin, val_set_size=2, save_strategy="steps", save_steps=1000)
    Recorder.calls.clear()
    cfg = loaded(config)
    do_train(cfg, TrainerCliArgs())
    trainer = Recorder.trainer
    return SimpleNamespace(cfg=cfg, trainer=trainer, calls=list(Recorder.calls), out=Path(cfg.output_dir))


def pair_loader(run: SimpleNamespace) -> Any:
    spin = run.trainer.loop.run
    pairs = read_pairs(spin.directory.pairs(1), spin.identity.before(1), spin.plan.iterations[1].rows)
    return run.trainer.loop.loader(PairDataset(pairs), spin.plan.iterations[1], epoch=0)


def test_order_of_the_hosts_calls(run: SimpleNamespace) -> None:
    """Each hook uses what an earlier one left; `register` sees the config as written; `post_train` fires twice, so the
    table is printed at the very end.

    A save that is asked for at an epoch's end happens before the next epoch's generation (`SaveAtIterationEnd`); no
    other is due here, until the host saves at the end of training.
    """
    assert run.calls == [
        "register with rl: spin",
        "load_datasets",
        "get_training_args",
        "add_callbacks_post_trainer",
        "post_trainer_create",
        "train",
        "epoch ends at 2",
        "saves at 2",
        "saves at 4",
        "epoch ends at 4",
        "trained",
        "post_train",
        "post_train",
        "post_train_unload",
    ]


def test_training_arguments_of_the_plugin_win(run: SimpleNamespace) -> None:
    """They replace the host's, by the names of its training arguments; the run ends at `total_num_steps`."""
    names = {"sample_packing", "eval_sample_packing", "dataloader_drop_last", "load_best_model_at_end"}
    names |= {"num_train_epochs", "max_steps", "save_steps", "eval_steps"}
    assert names <= {field.name for field in dataclasses.fields(AxolotlTrainingArguments)}
    args, state = run.trainer.args, run.trainer.state
    assert (args.max_steps, args.num_train_epochs) == (4, 2)
    assert (args.load_best_model_at_end, args.dataloader_drop_last, args.sample_packing) == (False, False, False)
    assert (state.max_steps, state.global_step, state.epoch) == (4, 4, 2.0)


def test_logs_have_no_perplexity_of_the_pair_loss(run: SimpleNamespace) -> None:
    """Held-out loss is a token's negative log-likelihood, so its perplexity stays."""
    logs = run.trainer.state.log_history
    assert [row["step"] for row in logs if "loss" in row] == [1, 2, 3, 4]
    assert [row["step"] for row in logs if "eval_loss" in row] == [0, 2, 4]  # the start model's first
    assert [row["learning_rate"] for row in logs if "loss" in row] == [0, 5e-4, 0, 5e-4]  # linear, 2 steps of warmup
    assert not any("ppl" in row for row in logs)
    for row in logs:
        if "eval_loss" in row:
            assert row["eval_ppl"] == pytest.approx(math.exp(row["eval_loss"]), abs=1e-4)


def test_the_hosts_trainer_would_log_a_perplexity(run: SimpleNamespace) -> None:
    """Why `compat.PairTrainer` exists; 0.21 can only switch both off."""
    plain = copy.copy(run.trainer)
    plain.__class__ = AxolotlTrainer
    plain.state = TrainerState()
    plain.log({"loss": 2.0})
    assert plain.state.log_history[-1]["ppl"] == pytest.approx(math.e**2, abs=1e-4)
    assert hasattr(AxolotlTrainer, "reports_token_perplexity") == REGISTERS_BY_ENTRY_POINT
    bases = SpinTrainer.__mro__
    assert bases.index(AxolotlTrainer) < bases.index(PairTrainer) == bases.index(Trainer) - 1


def test_the_host_resumes_from_the_last_checkpoint_and_ours_stay_out_of_its_way(run: SimpleNamespace) -> None:
    """`RunDirectory` keeps everything in `OUTPUT_DIR/spin`, which is no checkpoint to the host."""
    assert sorted(path.name for path in run.out.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    assert PREFIX_CHECKPOINT_DIR == "checkpoint"
    assert (run.out / "spin" / "iteration-1").is_dir()
    resumed = DictDefault({"output_dir": str(run.out), "auto_resume_from_checkpoints": True})
    assert determine_last_checkpoint(resumed) == str(run.out / "checkpoint-4") == resumed.resume_from_checkpoint


def test_save_model_writes_weights_config_and_tokenizer(run: SimpleNamespace) -> None:
    """`spin/iteration-N/model` is made by it and must load by itself."""
    assert parameters(Trainer.save_model) == ["self", "output_dir", "_internal_call"]
    for folder in (run.out / "spin" / "iteration-1" / "model", run.out):
        assert {"model.safetensors", "config.json", "tokenizer.json"} <= {path.name for path in folder.iterdir()}


# -- Trainer ----------------------------------------------------------------------------------------------------------


METHODS = {
    "_run_epoch": [
        "model", "epoch", "train_dataloader", "steps_in_epoch", "num_update_steps_per_epoch", "trial",
        "ignore_keys_for_eval", "start_time", "resume_from_checkpoint", "epochs_trained", "steps_trained_in_current_epoch",
    ],
    "_init_training_state": [
        "max_steps", "num_update_steps_per_epoch", "num_train_epochs", "resume_from_checkpoint", "trial",
    ],
    "set_initial_training_values": ["args", "dataloader"],
    "get_train_dataloader": [],
    "_prepare_inputs": ["inputs"],
    "create_optimizer": ["model"],
    "create_scheduler": ["num_training_steps", "optimizer"],
    "_get_num_items_in_batch": ["batch_samples", "device"],
    "compute_loss": ["model", "inputs", "return_outputs", "num_items_in_batch"],
    "log": ["logs", "start_time"],
    "_save_checkpoint": ["model", "trial"],
    "_load_from_checkpoint": ["resume_from_checkpoint", "model"],
}  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_overridden_method_exists_with_these_parameters(method: str) -> None:
    """A method of transformers' Trainer that was renamed would never be called; Axolotl's and ours must take as much."""
    assert parameters(getattr(Trainer, method)) == ["self", *METHODS[method]]
    if method != "_init_training_state":  # ours hands on whatever comes, by position
        inspect.signature(getattr(SpinTrainer, method)).bind(None, **dict.fromkeys(METHODS[method]))
    inspect.signature(getattr(AxolotlTrainer, method)).bind(None, **dict.fromkeys(METHODS[method]))


def test_methods_that_we_override_are_those() -> None:
    """A helper of ours whose name a new host takes for itself would be called in its place."""
    functions = {name for name, value in vars(SpinTrainer).items() if inspect.isfunction(value)}
    assert {name for name in functions if hasattr(AxolotlTrainer, name)} == set(METHODS)


def test_the_trainer_restores_tensors_by_their_names_in_memory(tmp_path: Path) -> None:
    """Those of merged experts stay as they were, with a warning; `run/restoring.py` can go when they do not."""
    architectures.build("mixtral", 47).save_pretrained(tmp_path / "start")
    policy, model = (MixtralForCausalLM.from_pretrained(tmp_path / "start") for _ in range(2))
    with torch.no_grad():
        for weight in policy.parameters():
            weight.add_(1)
    policy.save_pretrained(tmp_path / "checkpoint-3")
    told: list[Any] = []
    trainer: Any = SimpleNamespace(is_fsdp_enabled=False, _issue_warnings_after_load=told.append)
    Trainer._load_from_checkpoint(trainer, str(tmp_path / "checkpoint-3"), model)
    same = {name: torch.equal(weight, policy.get_parameter(name)) for name, weight in model.named_parameters()}
    assert same["lm_head.weight"] and not same["model.layers.0.mlp.experts.down_proj"]
    assert "model.layers.0.mlp.experts.down_proj" in told[0].missing_keys


def test_trainer_has_the_attributes_that_we_use(run: SimpleNamespace) -> None:
    trainer = run.trainer
    assert trainer.callback_handler.train_dataloader is not None
    assert trainer._created_lr_scheduler is True and isinstance(trainer.lr_scheduler, IterationSchedule)
    assert (trainer.is_fsdp_enabled, trainer.is_deepspeed_enabled) == (False, False)
    assert trainer.accelerator.state.distributed_type == trainer.accelerator.distributed_type == DistributedType.NO
    assert (trainer.accelerator.num_processes, trainer.accelerator.process_index) == (1, 0)
    assert trainer.accelerator.unwrap_model(trainer.model_wrapped) is trainer.model
    assert trainer.model_accepts_loss_kwargs in (True, False) and trainer.compute_loss_func is None
    # the last of the run's three micro-batches stood alone in its step
    assert trainer.current_gradient_accumulation_steps == 1


def test_set_initial_training_values_in_this_order(run: SimpleNamespace) -> None:
    """Ours returns a tuple in the same order: epochs, steps an epoch, rows, rows in all, batch, micro-batches, steps."""
    plain = copy.copy(run.trainer)
    plain.loop, plain.args = None, copy.copy(run.trainer.args)
    plain.args.max_steps, plain.args.num_train_epochs = -1, 5
    loader = torch.utils.data.DataLoader(list(range(11)), batch_size=2)
    assert plain.set_initial_training_values(plain.args, loader) == (5, 3, 11, 55, 4, 6, 15)
    assert run.trainer.set_initial_training_values(run.trainer.args, range(3)) == (2, 2, 6, 12, 4, 3, 4)


def test_init_training_state_returns_epochs_and_micro_batches(run: SimpleNamespace) -> None:
    """A resume answers it with the plan's epoch and the micro-batches to skip in it."""
    plain = copy.copy(run.trainer)
    plain.loop = None
    given = dict(num_update_steps_per_epoch=3, num_train_epochs=5, resume_from_checkpoint=str(run.out / "checkpoint-4"))
    assert plain._init_training_state(max_steps=15, trial=None, **given) == (1, (4 - 3) * 2)
    resumed = copy.copy(run.trainer)
    given["resume_from_checkpoint"] = str(run.out / "checkpoint-2")
    assert resumed._init_training_state(max_steps=4, trial=None, **given) == (1, 0)


def test_num_items_in_batch_of_pairs_is_none(run: SimpleNamespace) -> None:
    """The pairs of a step are counted in the hook that sees all its micro-batches."""
    batches, items = run.trainer.get_batch_samples(iter(pair_loader(run)), 2, torch.device("cpu"))
    assert (len(batches), items) == (2, None)
    assert run.trainer._pairs_in_step == 4


def test_training_step_divides_by_the_accumulation_steps_without_items(run: SimpleNamespace) -> None:
    """`compute_loss` multiplies by them; where `num_items_in_batch` is a count, some hosts leave the division out."""
    trainer = run.trainer
    batches, _ = trainer.get_batch_samples(iter(pair_loader(run)), 2, torch.device("cpu"))
    trainer.current_gradient_accumulation_steps = 2
    inputs = trainer._prepare_inputs(batches[0])
    whole = trainer.compute_loss(trainer.model_wrapped, inputs).item()
    assert trainer.training_step(trainer.model_wrapped, batches[0], None).item() == pytest.approx(whole / 2)
    assert whole != 0
    trainer.optimizer.zero_grad()


def test_a_checkpoint_keeps_what_the_trainer_logs_from(run: SimpleNamespace) -> None:
    """The Trainer starts these at zero in each start; `take_up` gives them what the checkpoint kept."""
    trainer = run.trainer
    assert trainer._tr_loss.shape == () and isinstance(trainer._total_loss_scalar, float)
    assert trainer._globalstep_last_logged == trainer.state.global_step == 4
    source = inspect.getsource(Trainer._inner_training_loop)
    order = ["_init_training_state(", "_prepare_for_training(", "self._tr_loss = ", "on_train_begin(", "_run_epoch("]
    assert [source.index(name) for name in order] == sorted(source.index(name) for name in order)
    checkpoint = read_checkpoint(run.out / "checkpoint-2")
    assert not checkpoint.fault and {"trainer_state.json", "optimizer.pt", "scheduler.pt", "rng_state.pth"} <= set(
        checkpoint.mark["files"]
    )
    assert checkpoint.state["iteration"] == 0


def test_the_host_resumes_from_where_it_is_told(tmp_path: Path) -> None:
    """`settle_start` decides; the host alone would take the last folder by name, finished or not."""
    (tmp_path / "checkpoint-7").mkdir()
    told = DictDefault(output_dir=str(tmp_path), resume_from_checkpoint="there", auto_resume_from_checkpoints=False)
    assert determine_last_checkpoint(told) == "there"
    afresh = DictDefault(output_dir=str(tmp_path), resume_from_checkpoint=None, auto_resume_from_checkpoints=False)
    assert determine_last_checkpoint(afresh) is None
    alone = DictDefault(output_dir=str(tmp_path), resume_from_checkpoint=None, auto_resume_from_checkpoints=True)
    assert determine_last_checkpoint(alone) == str(tmp_path / "checkpoint-7")


def test_the_process_groups_store_can_be_cloned_and_asked(tmp_path: Path) -> None:
    """`Peers` looks for another rank's failure in it, over a connection of its own."""
    assert hasattr(torch.distributed.distributed_c10d, "_get_default_store")
    for store in (torch.distributed.HashStore(), torch.distributed.FileStore(str(tmp_path / "store"), 1)):
        other = torch.distributed.PrefixStore("p", store).clone()
        assert not other.check(["failure"])
        torch.distributed.PrefixStore("p", store).set("failure", "why")
        assert other.check(["failure"]) and other.get("failure") == b"why"
        assert (other.add("seen", 1), other.add("seen", 0)) == (1, 1)


def test_default_flow_stops_at_max_steps(run: SimpleNamespace) -> None:
    """The host's `max_steps` may end the last iteration in mid-epoch."""
    args = run.trainer.args
    state = TrainerState(max_steps=3, global_step=2, logging_steps=1, eval_steps=1, save_steps=1)
    assert not DefaultFlowCallback().on_step_end(args, state, TrainerControl()).should_training_stop
    state.global_step = 3
    assert DefaultFlowCallback().on_step_end(args, state, TrainerControl()).should_training_stop


def test_save_strategy_no_is_respected(tmp_path: Path) -> None:
    plan = make_plan(4, global_batch=2, num_epochs=1, history=0, betas=[1, 1], learning_rates=[1, 1])
    state = TrainerState(global_step=2)
    for strategy, asked in (("no", False), ("steps", True), ("epoch", True)):
        args = SimpleNamespace(output_dir=str(tmp_path), save_strategy=SaveStrategy(strategy))
        assert SaveAtIterationEnd(plan).on_epoch_end(args, state, TrainerControl()).should_save is asked


def test_deepspeed_casts_floating_inputs_and_ours_does_not() -> None:
    """In bf16 an opponent's log-prob of -200.3 is -200 and one of -201.3 is -201: margins would be off by tenths."""
    engine = SimpleNamespace(hf_ds_config=SimpleNamespace(dtype=lambda: torch.bfloat16))
    trainer = SimpleNamespace(
        args=SimpleNamespace(device=torch.device("cpu")),
        is_deepspeed_enabled=True,
        accelerator=SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=engine)),
    )
    logps = torch.tensor([-200.3], dtype=torch.float64)
    assert Trainer._prepare_input(trainer, logps).dtype == torch.bfloat16
    batch = SpinTrainer._prepare_inputs(trainer, {"completion_lengths": torch.ones(1), "opponent_logps": logps})
    assert batch["opponent_logps"].item() == -200.3


# -- learning rates ---------------------------------------------------------------------------------------------------

# name in the YAML: `lr_scheduler_kwargs` that it needs, or that make its rates proportional to the peak
SCHEDULERS: dict[str, dict[str, Any]] = {
    "linear": {},
    "cosine": {},
    "cosine_with_restarts": {"num_cycles": 2},
    "polynomial": {"lr_end": 0.0},
    "constant": {},
    "constant_with_warmup": {},
    "inverse_sqrt": {},
    "cosine_with_min_lr": {"min_lr_rate": 0.1},
    "cosine_warmup_with_min_lr": {"min_lr_rate": 0.1},
    "warmup_stable_decay": {"num_decay_steps": 3},
    "one_cycle": {},
    "rex": {},
}
# the host's own keys beside `lr_scheduler`
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in SCHEDULERS),
    ("cosine", {"lr_quadratic_warmup": True}),
    ("cosine", {"cosine_min_lr_ratio": 0.1}),
    ("cosine", {"cosine_min_lr_ratio": 0.1, "cosine_constant_lr_ratio": 0.8}),
    ("rex", {"cosine_min_lr_ratio": 0.1}),
]


def test_schedulers_are_those() -> None:
    assert {name.value for name in SchedulerType} | {"one_cycle", "rex"} == {
        *SCHEDULERS,
        "reduce_lr_on_plateau",
        "greedy",
    }


@pytest.mark.parametrize(("name", "keys"), VARIANTS)
def test_every_scheduler_that_we_accept_restarts(run: SimpleNamespace, name: str, keys: dict[str, Any]) -> None:
    """The table plays the host's own scheduler once an iteration, on a copy of the trainer, at that iteration's peak."""
    trainer = copy.copy(run.trainer)
    alternate = name in ("one_cycle", "rex")  # as the host's builder passes them
    own = {
        "lr_scheduler_type": SchedulerType("cosine" if alternate else name),
        "alternate_lr_scheduler_type": name if alternate else None,
        "lr_scheduler_kwargs": SCHEDULERS[name],
        **keys,
    }
    trainer.args = copy.copy(trainer.args)
    for key, value in own.items():
        assert hasattr(trainer.args, key)
        setattr(trainer.args, key, value)
    warmup = {"warmup_steps": 2, "warmup_ratio": None}
    rates = [1e-3, 5e-4]
    plan = make_plan(20, global_batch=2, num_epochs=1, history=0, betas=[1, 1], learning_rates=rates, warmup=warmup)
    table = learning_rate_table(plan, trainer._host_scheduler)
    assert len(table) == plan.total_steps == 20
    assert max(table[:10]) == pytest.approx(1e-3) and min(table) >= 0
    assert table[10:] == pytest.approx([rate / 2 for rate in table[:10]])
    assert trainer.lr_scheduler is run.trainer.lr_scheduler
    if name == "linear":
        assert table[:10] == pytest.approx([0, 5e-4, *(1e-3 * left / 8 for left in range(8, 0, -1))])
    if keys:
        plain = copy.copy(trainer)
        plain.args = copy.copy(trainer.args)
        for key in keys:
            setattr(plain.args, key, None)
        assert table != pytest.approx(learning_rate_table(plan, plain._host_scheduler))


def test_a_copy_of_the_trainer_makes_a_scheduler_of_its_own(run: SimpleNamespace) -> None:
    """DeepSpeed sets the copy's scheduler to None and asks it for one by keyword, over its own optimizer."""
    other = copy.copy(run.trainer)
    other.lr_scheduler = None
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
    made = other.create_scheduler(num_training_steps=4, optimizer=optimizer)
    assert isinstance(made, IterationSchedule) and made.optimizer is optimizer
    assert made is not run.trainer.lr_scheduler and other.lr_scheduler is made


# -- model, generation, accelerate ------------------------------------------------------------------------------------


def test_dropout_is_found_in_modules_and_attention() -> None:
    """`disable_dropout` sets both: attention modules keep their rate as a plain number, LoRA has modules of its own."""
    model = tiny.model(50, attention_dropout=0.2)
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"], lora_dropout=0.1, task_type="CAUSAL_LM"))
    assert disable_dropout(adapted) == ["attention_dropout=0.2", "dropout=0.1"]
    assert disable_dropout(adapted) == []


@pytest.fixture(scope="module")
def uniform() -> Any:
    """A model that gives each of 200 tokens nearly the same probability, without ties."""
    model = tiny.model(200).eval()
    torch.nn.init.normal_(model.lm_head.weight, std=1e-4)
    return model


def drawn(model: Any, **settings: Any) -> set[int]:
    """Returns the distinct first tokens of 1000 samples."""
    torch.manual_seed(0)
    config = GenerationConfig(do_sample=True, max_new_tokens=1, pad_token_id=0, **settings)
    ids = torch.full((1000, 1), 7)
    answers = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config, synced_gpus=False
    )
    assert answers.shape == (1000, 2)
    return set(answers[:, 1].tolist())


def test_top_k_of_zero_is_off_and_left_unset_it_is_not(uniform: Any) -> None:
    """Our `top_k: null` must be passed as 0: unset, it is the model's own, or 50."""
    uniform.generation_config = GenerationConfig(top_k=3)
    assert len(drawn(uniform, temperature=1.0, top_p=1.0)) == 3
    assert len(drawn(uniform, temperature=1.0, top_p=1.0, top_k=0)) > 150
    assert len(drawn(uniform, temperature=1.0, top_p=1.0, top_k=5)) == 5


def test_unset_values_come_from_the_models_own_generation_config(uniform: Any) -> None:
    """Which is why `_generation_config` puts it aside: nothing but our settings may bend the samples."""
    own = uniform.generation_config = GenerationConfig(suppress_tokens=list(range(190)))
    assert drawn(uniform, top_k=0) == set(range(190, 200))
    with _generation_config(uniform):
        assert len(drawn(uniform, top_k=0)) > 150
    assert uniform.generation_config is own
    adapted = get_peft_model(tiny.model(50), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    inner = adapted.get_base_model().generation_config
    with _generation_config(adapted):
        assert adapted.generation_config is not inner and adapted.generation_config.eos_token_id is None
    assert adapted.generation_config is inner


def test_generation_stops_at_any_of_several_tokens_and_pads() -> None:
    """`cut` looks for the first stop token and takes the rest for padding."""
    model = tiny.model(8).eval()
    ids = torch.full((64, 1), 7)
    config = GenerationConfig(do_sample=True, top_k=0, max_new_tokens=6, eos_token_id=[3, 5], pad_token_id=0)
    torch.manual_seed(0)
    tokens = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config)
    ended = {3: 0, 5: 0}
    for answer in tokens[:, 1:].tolist():
        stops = [position for position, token in enumerate(answer) if token in (3, 5)]
        if stops:
            ended[answer[stops[0]]] += 1
            assert set(answer[stops[0] + 1 :]) <= {0}
    assert min(ended.values()) > 0


def test_reduce_takes_the_kind_of_reduction_second() -> None:
    """Counts and log-probs are summed over ranks; we always say so, since accelerate's two `reduce` differ in default."""
    assert parameters(Accelerator.reduce)[1:3] == ["tensor", "reduction"]


def test_collectives_work_without_a_process_group(run: SimpleNamespace) -> None:
    """On one rank, what rank 0 found is what there is (`Ranks.on_main`), and a sum is itself."""
    box = [{"done": [1, 2]}]
    broadcast_object_list(box)
    assert box == [{"done": [1, 2]}]
    assert run.trainer.accelerator.reduce(torch.tensor([1.0, 2.0]), "sum").tolist() == [1.0, 2.0]
    run.trainer.accelerator.wait_for_everyone()


def test_fsdp_plugin_changes_its_state_dict_type_and_back() -> None:
    """An iteration's model is saved whole, also where checkpoints are sharded (`policy.save_whole`)."""
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, state_dict_type="SHARDED_STATE_DICT")
    kept = plugin.state_dict_type
    plugin.set_state_dict_type("FULL_STATE_DICT")
    assert (kept.name, plugin.state_dict_type.name) == ("SHARDED_STATE_DICT", "FULL_STATE_DICT")
    plugin.set_state_dict_type(kept)
    assert plugin.state_dict_type == kept


def test_fsdp2_modules_reshard() -> None:
    """After a forward without backward the root's parameters stay gathered (`training.policy.frozen`)."""
    from torch.distributed.fsdp import FSDPModule

    assert parameters(FSDPModule.reshard) == ["self"]


def test_fsdp2_modules_stay_gathered_when_told() -> None:
    """`ranks.gather` has every part gathered once, and not let go of by its own forward."""
    from torch.distributed.fsdp import FSDPModule

    assert parameters(FSDPModule.set_reshard_after_forward) == ["self", "reshard_after_forward", "recurse"]
    assert parameters(FSDPModule.unshard)[0] == "self"


def test_zero3_has_its_hooks_where_they_are_taken_off() -> None:
    """`ranks.gather` gathers all weights once, and has no forward gather, let go of, or compare anything by itself."""
    deepspeed = pytest.importorskip("deepspeed", reason="deepspeed is not installed here")
    from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
    from trl.models.utils import add_hooks, remove_hooks

    assert parameters(deepspeed.zero.GatheredParameters.__init__)[:2] == ["self", "params"]
    source = inspect.getsource(DeepSpeedZeRoOffload)
    assert "self.fwd_pre_hook = self.module.register_forward_pre_hook(" in source
    assert parameters(add_hooks) == parameters(remove_hooks) == ["model"]
    assert "optimizer.parameter_offload" in inspect.getsource(remove_hooks)


def test_optimizer_wrapper_shows_what_it_wraps(run: SimpleNamespace) -> None:
    """`restart_optimizer` goes down to torch's optimizer, which makes state where a parameter has none."""
    optimizer = copy.copy(run.trainer.optimizer)
    assert isinstance(optimizer, AcceleratedOptimizer) and isinstance(optimizer.optimizer, torch.optim.AdamW)
    parameter = torch.nn.Parameter(torch.ones(1))
    wrapper = AcceleratedOptimizer(torch.optim.AdamW([parameter], lr=0.1))
    for _ in range(2):
        restart_optimizer(wrapper)
        parameter.grad = torch.ones(1)
        wrapper.step()
        assert wrapper.optimizer.state[parameter]["step"].item() == 1


def test_deepspeed_optimizers_live_in_its_runtime_and_wrap_one() -> None:
    """`restart_optimizer` zeroes their state in place, and knows them by the module of the wrapper."""
    pytest.importorskip("deepspeed")
    from accelerate.utils.deepspeed import DeepSpeedOptimizerWrapper
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    assert issubclass(DeepSpeedOptimizerWrapper, AcceleratedOptimizer)
    for kind in (DeepSpeedZeroOptimizer, DeepSpeedZeroOptimizer_Stage3):
        assert kind.__module__.startswith("deepspeed.runtime")
        assert "self.optimizer = " in inspect.getsource(kind.__init__)
        assert {"state", "param_groups"} <= set(dir(kind))


@pytest.mark.parametrize("name", ["gemma3", "mistral3", "qwen3_5", "voxtral", "llama"])
def test_the_class_of_a_model_that_takes_more_than_text(name: str) -> None:
    """`empty_model` follows the host's loader, whose choice depends on `is_multimodal`."""
    config, multimodal = architectures.config_of(name, 47), name != "llama"
    loader: Any = ModelLoader.__new__(ModelLoader)
    loader.cfg, loader.model_config = DictDefault(is_multimodal=multimodal), config
    loader.auto_model_loader = AutoModelForCausalLM
    loader._set_auto_model_loader()
    kind = loader.auto_model_loader
    with torch.device("meta"):
        expected = kind.from_config(config) if hasattr(kind, "from_config") else kind(config)
        assert type(empty_model(config, multimodal=multimodal, trusted=False)) is type(expected)


def test_the_collator_of_rows_with_pictures(tmp_path: Path) -> None:
    """`host_collator` is what the host's builder gives SFT on the same config: `data/images.py` reads its strategy."""
    pictured.save("gemma3", tmp_path / "model")
    keys = {"rl": None, "spin": None, "plugins": None, "role_boundaries": None, "image_size": 24}
    cfg = DictDefault({**pictured.settings("gemma3", tmp_path), **keys, "processor_config": str(tmp_path / "model")})
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    processor = load_processor(cfg, tokenizer)
    found = host_collator(cfg, tokenizer, processor)
    assert type(found) is MultiModalChatDataCollator
    strategy = found.processing_strategy
    assert type(strategy).__name__ == "Gemma3ProcessingStrategy" and strategy.image_size == 24
    assert strategy.chat_template == get_chat_template("gemma3") and strategy.role_boundaries
    assert not strategy.train_on_inputs
    row = Dataset.from_parquet(str(tmp_path / "data.parquet"))[0]
    batch = found([row])
    assert {"input_ids", "attention_mask", "labels", "pixel_values", "token_type_ids"} <= set(batch)
    assert batch["labels"].shape == batch["input_ids"].shape == batch["token_type_ids"].shape


# -- kernels that no CPU runs -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keys", [{"flex_attention": True}, {"attn_implementation": "flex_attention"}])
def test_flex_attention_has_one_name_in_the_end(folder: Path, keys: dict[str, Any]) -> None:
    """By it `layout_check.py` chooses the shared layout, and `logprobs.py` the kind of mask."""
    cfg = validated(settings(folder, **keys))
    assert cfg.attn_implementation == "flex_attention" and cfg.flash_attention is None
    loader = ModelLoader.__new__(ModelLoader)
    loader.cfg, loader.model_config, loader.model_kwargs = cfg, SimpleNamespace(), {}
    loader._set_attention_config()
    assert loader.model_config._attn_implementation == "flex_attention"


def test_a_block_mask_reaches_the_attention_as_it_is() -> None:
    """`layouts.py` makes the mask of a shared row; a model must not lay its own causal or sliding mask over it."""
    from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

    mask = shared_block_mask(torch.zeros(1, 128, dtype=torch.int64))
    config = tiny.model(47, sliding_window=8).config
    config._attn_implementation = "flex_attention"
    names = [name for name in parameters(create_causal_mask) if name in ("input_embeds", "inputs_embeds")]
    given = {names[0]: torch.zeros(1, 128, 32), "attention_mask": mask, "past_key_values": None, "position_ids": None}
    if "cache_position" in parameters(create_causal_mask):
        given["cache_position"] = torch.arange(128)
    for make in (create_causal_mask, create_sliding_window_causal_mask):
        assert make(config=config, **given) is mask


@pytest.mark.parametrize("kernels", ["scattermoe", "sonicmoe"])
def test_kernels_for_experts_replace_the_experts_alone(kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plugin names an implementation of the experts' forward and brings no trainer; head, routing, attention stay."""
    plugin = importlib.import_module("axolotl.integrations.kernels").KernelsPlugin()
    for name in ("scattermoe", "sonicmoe"):  # whose kernels are imported where a GPU is
        module = SimpleNamespace(**{f"register_{name}_experts": lambda: None})
        path = f"axolotl.integrations.kernels.libs.{name}{'_lora' if name == 'scattermoe' else ''}"
        monkeypatch.setitem(sys.modules, f"{path}.experts", module)
        monkeypatch.setitem(
            sys.modules, f"{path}.runtime", SimpleNamespace(configure_scattermoe_runtime=lambda _: None)
        )
    monkeypatch.setitem(vars(sys.modules[type(plugin).__module__]), "relax_quantized_training_guard", lambda: None)
    monkeypatch.setattr(plugin, "_adapters", lambda cfg: [])
    cfg = DictDefault({f"use_{kernels}": True})
    plugin.pre_model_load(cfg)
    assert cfg.experts_implementation == kernels and plugin.get_trainer_cls(cfg) is None


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_implementations_of_experts_give_the_same_log_probs(name: str) -> None:
    """`experts_implementation` of the host, as far as a CPU has any: policy and opponent may not differ by it."""
    model = architectures.build(name, 47).eval()
    batch = PairCollator(0)([PAIR])
    found = []
    for implementation in ("eager", "batched_mm", "grouped_mm"):
        model.set_experts_implementation(implementation)
        assert model.config._experts_implementation == implementation
        with torch.no_grad():
            found.append(completion_logps(model, batch))
    torch.testing.assert_close(found[1], found[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found[2], found[0], atol=1e-5, rtol=1e-5)
