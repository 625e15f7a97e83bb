"""The SFT configs that the host ships, with `rl: spin` added: which of them are taken, and why the others are not.

`examples.json` has facts of them: where they stand in the host's `examples/`, the model, and the keys that choose how it is
trained (Axolotl's main branch of 24 July 2026; archived examples, those of other methods and keys of paths, names and sizes
are left out; examples with the same keys share an entry). Each is validated on a machine of eight H100, which is feigned:
without `rl: spin`, and where the host takes it, with.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import host
import pytest
from axolotl.integrations.base import PluginManager
from axolotl.utils.config import prepare_plugins, validate_config
from axolotl.utils.dict import DictDefault
from pydantic import ValidationError

EXAMPLES = json.loads((Path(__file__).parent / "examples.json").read_text())
# the only keys for which an example that the host takes is refused, each with a reason in docs/known-limitations.md
REFUSED = {
    "skip_prepare_dataset": "images, which have no prompts as tokens",
    "processor_type": "images",
    "pretraining_dataset": "no prompts",
    "streaming": "no end of the data, each of whose prompts is answered",
    "relora": "the adapter is merged while the opponent has to stand still",
    "tensor_parallel_size": "ranks that share prompts",
    "context_parallel_size": "ranks that share prompts",
    "expert_parallel_size": "ranks that share prompts",
}
# a few of different kinds in every run of the tests, all of them by `make test-configs`
SAMPLE = EXAMPLES[::15]


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
    # one rank of a kind is none
    reasons = {
        key for key in REFUSED if entry["keys"].get(key) and not (key.endswith("_size") and entry["keys"][key] == 1)
    }
    if reasons:
        assert any(f"`{key}: " in words for key in reasons), (entry["examples"], words)
    else:
        assert not words, (entry["examples"], words)
    return True


def test_some_examples_with_one_key_added(folder: Path) -> None:
    taken = [check(entry, folder) for entry in SAMPLE]
    assert sum(taken) > len(taken) / 2  # else the test says little


@pytest.mark.configs
def test_every_example_with_one_key_added(folder: Path) -> None:
    taken = [check(entry, folder) for entry in EXAMPLES]
    assert sum(taken) > len(taken) / 2
