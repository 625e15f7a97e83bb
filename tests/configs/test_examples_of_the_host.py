"""The SFT configs that the host ships, with `rl: spin` added: which of them are taken, and why the others are not.

`examples.json` has facts of them: where they stand in the host's `examples/`, the model, and the keys that choose how it is
trained (Axolotl's main branch of 24 July 2026; archived examples, those of other methods and keys of paths, names and sizes
are left out; examples with the same keys share an entry). Each is validated on a machine of eight H100, which is feigned:
without `rl: spin`, and where the host takes it, with. What they combine is then run in bf16 on one process: adapters,
quantised weights, optimizers, schedules, recomputation, packing. Sharding and kernels have tests of their own.
"""

from __future__ import annotations

import gc
import importlib
import json
import math
import os
from pathlib import Path
from typing import Any

import host
import pytest
from axolotl.integrations.base import PluginManager
from axolotl.utils.config import prepare_plugins, validate_config
from axolotl.utils.dict import DictDefault
from pydantic import ValidationError
from warm import Warm

EXAMPLES = json.loads((Path(__file__).parent / "examples.json").read_text())
# the only keys for which an example that the host takes is refused, each with a reason in docs/known-limitations.md
REFUSED = {
    "pretraining_dataset": "no prompts",
    "streaming": "no end of the data, each of whose prompts is answered",
    "relora": "the adapter is merged while the opponent has to stand still",
    "tensor_parallel_size": "ranks that share prompts",
    "context_parallel_size": "ranks that share prompts",
    "expert_parallel_size": "ranks that share prompts",
}
# a few of different kinds in every run of the tests, all of them by `make test-configs`
SAMPLE = EXAMPLES[::15]
# the keys of a combination that a CPU can run; what else an entry says is tested by `training/test_features.py`, sharding
# by `training/test_layouts.py`
RUN = (
    *("adapter", "load_in_4bit", "load_in_8bit", "lora_target_linear", "lora_modules_to_save", "peft_use_rslora"),
    *("unfrozen_parameters", "resize_token_embeddings_to_32x", "bnb_config_kwargs", "sample_packing"),
    *("optimizer", "lr_scheduler", "cosine_min_lr_ratio", "cosine_constant_lr_ratio", "gradient_checkpointing"),
    *("train_on_inputs", "use_eaft", "curriculum_sampling", "early_stopping_patience", "save_strategy"),
    *("save_only_model", "eval_sample_packing"),
)


def combinations() -> list[dict[str, Any]]:
    """Returns each combination of what is run that an example has which is not refused, once."""
    found = {}
    for entry in EXAMPLES:
        if not refusals(entry["keys"]):
            keys = {key: entry["keys"][key] for key in RUN if entry["keys"].get(key) not in (None, False)}
            found.setdefault(json.dumps(keys, sort_keys=True), keys)
    return list(found.values())


def refusals(keys: dict[str, Any]) -> set[str]:
    """Returns the keys for which an example is refused; one rank of a kind is none."""
    return {key for key in REFUSED if keys.get(key) and not (key.endswith("_size") and keys[key] == 1)}


def config(keys: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Returns a config of an example's keys, with a model and data of ours."""
    made = {**host.config(folder, rl=None, spin=None, bf16=None, fp16=None), **keys}
    made["plugins"] = list(keys.get("plugins", ()))
    if "deepspeed" in keys:
        stage = int(keys["deepspeed"].removeprefix("zero")[0])
        made["deepspeed"] = str(folder / keys["deepspeed"])
        zero = {"stage": stage, "gather_16bit_weights_on_model_save": True} if stage == 3 else {"stage": stage}
        Path(made["deepspeed"]).write_text(json.dumps({"zero_optimization": zero}))
    if {"pretraining_dataset", "streaming"} & keys.keys():
        made["max_steps"] = 10
    if "early_stopping_patience" in keys:
        made |= {"save_steps": 10, "eval_steps": 10, "val_set_size": 0.1}
    return made


def validated(settings: dict[str, Any]) -> Any:
    """Returns a config as the host validates it."""
    PluginManager._instance = None
    cfg = DictDefault(json.loads(json.dumps(settings)))
    if cfg.plugins:
        prepare_plugins(cfg)
    return validate_config(cfg, capabilities=host.EIGHT_H100, env_capabilities={"torch_version": "2.11.0"})


def in_a_fork(settings: dict[str, Any]) -> str:
    """Returns what refuses a config, or nothing; in a process of its own, since plugins change the host for good."""
    ours, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        gc.disable()  # what earlier tests left may join threads when it is collected, which a fork has not
        try:
            validated(settings)
            words = ""
        except (ValidationError, ValueError, ImportError, TypeError, AttributeError, KeyError) as error:
            words = f"{type(error).__name__}: {error}"
        os.write(theirs, words.encode()[:4000])
        os._exit(0)
    os.close(theirs)
    with os.fdopen(ours, "rb") as file:
        words = file.read().decode(errors="replace")
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    return words


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("examples")


def check(entry: dict[str, Any], folder: Path) -> bool:
    """Checks an entry; returns whether the host takes it by itself."""
    settings = config(entry["keys"], folder)
    if in_a_fork(settings):
        return False
    words = in_a_fork({**settings, "rl": "spin", "plugins": [*settings["plugins"], "axolotl_spin.SpinPlugin"]})
    reasons = refusals(entry["keys"])
    if reasons:
        assert any(f"`{key}: " in words for key in reasons), (entry["examples"], words)
    else:
        assert not words, (entry["examples"], words)
    return True


# not among what the pinned hosts install
ABSENT = {"axolotl.integrations.llm_compressor.LLMCompressorPlugin"}


def test_plugins_of_examples_leave_the_trainer_to_us() -> None:
    """Kernels for experts and heads (Liger, cut cross entropy, ScatterMoE, SonicMoE) replace parts of a model, no trainer.

    Diffusion models are trained otherwise: the one plugin that is refused, once the config is read.
    """
    names = {name for entry in EXAMPLES for name in entry["keys"].get("plugins", ())} - ABSENT
    bring = set()
    for name in names:
        module, _, plugin = name.rpartition(".")
        if getattr(importlib.import_module(module), plugin)().get_trainer_cls(DictDefault({})) is not None:
            bring.add(name)
    assert len(names) > 4 and bring == {"axolotl.integrations.diffusion.DiffusionPlugin"}


def test_some_examples_with_one_key_added(folder: Path) -> None:
    taken = [check(entry, folder) for entry in SAMPLE]
    assert sum(taken) > len(taken) / 2  # else the test says little


@pytest.mark.configs
def test_every_example_with_one_key_added(folder: Path) -> None:
    taken = [check(entry, folder) for entry in EXAMPLES]
    assert sum(taken) > len(taken) / 2


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("played")
    host.config(made, rows=8)
    return made


@pytest.mark.host
@pytest.mark.parametrize("keys", [pytest.param(keys, marks=pytest.mark.configs) for keys in combinations()])
def test_what_examples_combine_plays_two_iterations(
    keys: dict[str, Any], played: Path, warm: Warm, request: Any
) -> None:
    changes = {**keys, "bf16": False, "bfloat16": True, "plugins": ["half.HalfPlugin", *host.OURS]}
    if "adapter" in keys:
        linear = {} if keys.get("lora_target_linear") else {"lora_target_modules": ["q_proj", "v_proj", "down_proj"]}
        changes = {**host.LORA, "lora_target_linear": None, **linear, **changes}
        # the host freezes the adapter with all else, so that such an example trains nothing: refused, see `test_features`
        changes.pop("unfrozen_parameters", None)
    if keys.get("gradient_checkpointing") == "offload":  # by an accelerator's streams
        changes["gradient_checkpointing"] = True
    if "unfrozen_parameters" in changes:  # the names of ours
        changes["unfrozen_parameters"] = ["^lm_head.weight$", "^model.layers.1.*"]
    if {"early_stopping_patience", "save_strategy"} & keys.keys():
        changes |= {"val_set_size": 2, "eval_steps": 1}
        changes |= {"save_steps": 1} if keys.get("save_strategy") != "best" else {"metric_for_best_model": "eval_loss"}
    changes["output_dir"] = str(played / request.node.callspec.id)
    run = host.train(host.config(played, rows=8, **changes), by=warm)
    firsts = [run.metrics(iteration)["loss_first"] for iteration in range(2)]
    assert firsts == pytest.approx([math.log(2)] * 2, abs=1e-6)
    assert min(run.losses()) < 0.6931 and "is off by" not in run.output
