"""Wrong configs and datasets through the host's own command: each stops before a model loads, and names what to change."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import host
import pytest
import tiny
import yaml
from test_args import OFFENDING
from warm import Warm

pytestmark = pytest.mark.host

Change = dict[str, Any] | Callable[[Path], dict[str, Any]]


def rows(*made: dict[str, Any], **dataset: Any) -> Callable[[Path], dict[str, Any]]:
    """Returns the change to a dataset of the given rows."""

    def change(folder: Path) -> dict[str, Any]:
        path = folder / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in made))
        entry = {"path": str(path), "ds_type": "json", "type": "chat_template", **dataset}
        return {"datasets": [{key: value for key, value in entry.items() if value is not None}]}

    return change


def tokens(labels: list[int]) -> dict[str, Any]:
    return {"input_ids": [7, 8, 6], "attention_mask": [1, 1, 1], "labels": labels}


def turn(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def inside(name: str, make: Callable[[Path], Any], **changes: Any) -> Callable[[Path], dict[str, Any]]:
    """Returns the change after something was put into the output folder."""

    def change(folder: Path) -> dict[str, Any]:
        path = folder / "out" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        make(path)
        return changes

    return change


def sft_checkpoint(path: Path) -> None:
    path.mkdir()
    (path / "model.safetensors").write_bytes(b"weights")


def output_is_a_file(folder: Path) -> dict[str, Any]:
    (folder / "taken").write_text("")
    return {"output_dir": str(folder / "taken")}


def output_is_the_start(folder: Path) -> dict[str, Any]:
    return {"base_model": str(tiny.save(folder / "out")), "output_dir": str(folder / "out")}


SPIN: dict[str, tuple[Any, str]] = {
    "unknown key": ({"iteration": 2}, "there is no key `spin.iteration`: did you mean `spin.iterations`?"),
    "unknown generation key": ({"generation": {"max_tokens": 3}}, "did you mean `spin.generation.max_new_tokens`?"),
    "a key one level too high": ({"max_new_tokens": 3}, "write `spin.generation.max_new_tokens`"),
    "a key one level too low": ({"generation": {"iterations": 3}}, "write `spin.iterations`"),
    "a key of the host's": ({"num_epochs": 3}, "write the host's `num_epochs`, at the top"),
    "no iterations": ({"iterations": 0}, "spin.iterations"),
    "iterations as a word": ({"iterations": "three"}, "spin.iterations"),
    "fractional iterations": ({"iterations": 2.5}, "spin.iterations"),
    "beta 0": ({"beta": 0}, "spin.beta"),
    "negative beta": ({"beta": -1}, "spin.beta"),
    "beta as a word": ({"beta": "high"}, "spin.beta"),
    "beta not a number": ({"beta": float("nan")}, "spin.beta"),
    "infinite beta": ({"beta": float("inf")}, "spin.beta"),
    "too few betas": ({"beta": [0.1]}, "spin.beta lists 1 values, but spin.iterations is 3"),
    "a wrong beta in a list": ({"beta": [0.1, "x", 0.1]}, "spin.beta"),
    "too many learning rates": ({"learning_rate": [1e-6] * 4}, "spin.learning_rate lists 4 values"),
    "learning rate 0": ({"learning_rate": 0}, "spin.learning_rate"),
    "learning rate as a word": ({"learning_rate": "fast"}, "spin.learning_rate"),
    "too much history": ({"iterations": 2, "history": 2}, "spin.history is 2, but only 0 to 1"),
    "negative history": ({"history": -1}, "spin.history"),
    "unknown loss": ({"loss": "ipo"}, "'sigmoid', 'hinge' or 'space'"),
    "length normalisation as a number": ({"length_normalized": 3}, "spin.length_normalized"),
    "no schedule": ({"schedule_epochs": 0}, "spin.schedule_epochs"),
    "no prompts in an iteration": ({"prompts_per_iteration": 0}, "spin.prompts_per_iteration"),
    "more prompts in an iteration than there are": (
        {"prompts_per_iteration": 99},
        "`spin.prompts_per_iteration: 99` is more than the",
    ),
    "negative sft weight": ({"sft_weight": -0.1}, "spin.sft_weight"),
    "no prompts": ({"max_prompts": 0}, "spin.max_prompts"),
    "unknown turns": ({"turns": "first"}, "'last' or 'all'"),
    "unknown backend": ({"generation": {"backend": "sglang"}}, "spin.generation.backend"),
    "negative temperature": ({"generation": {"temperature": -1}}, "spin.generation.temperature"),
    "top_p 0": ({"generation": {"top_p": 0}}, "spin.generation.top_p"),
    "top_p above 1": ({"generation": {"top_p": 1.5}}, "spin.generation.top_p"),
    "top_k 0": ({"generation": {"top_k": 0}}, "spin.generation.top_k"),
    "batch size 0": ({"generation": {"batch_size": 0}}, "spin.generation.batch_size"),
    "no new tokens": ({"generation": {"max_new_tokens": 0}}, "spin.generation.max_new_tokens"),
    "negative seed": ({"generation": {"seed": -1}}, "spin.generation.seed"),
    "negative held-out prompts": ({"eval_prompts": -1}, "spin.eval_prompts"),
    "held-out prompts without data": (
        {"eval_prompts": 8},
        "`spin.eval_prompts: 8` needs held-out data, but `val_set_size`",
    ),
    "not a block": ("yes", "block of keys"),
    "a list for a block": (["iterations"], "block of keys"),
    "generation not a block": ({"generation": "vllm"}, "spin.generation"),
}


def stretched(folder: Path) -> dict[str, Any]:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    model = tiny.save(folder / "model", rope_parameters=rope, max_position_embeddings=16)
    return {"base_model": str(model), "spin": {"generation": {"max_new_tokens": 20}}}


HOST: dict[str, tuple[Change, str]] = {
    "block without the switch": ({"rl": None, "spin": {"iterations": 2}}, "write `rl: spin`"),
    "block with another rl": ({"rl": "dpo", "spin": {"iterations": 2}}, "write `rl: spin`"),
    "a key at the top": ({"iterations": 3}, "`iterations` stands at the top of the config, where nothing reads it"),
    "a block at the top": ({"generation": {"max_new_tokens": 3}}, "write `spin.generation`"),
    "fsdp 1": ({"fsdp_version": 1, "fsdp_config": {"fsdp_version": 1}}, "set `fsdp_version: 2`"),
    "no epochs": ({"num_epochs": 0}, "num_epochs"),
    "a schedule shorter than the iteration": (
        {"num_epochs": 2, "spin": {"schedule_epochs": 1}},
        "`spin.schedule_epochs: 1` is less than `num_epochs: 2`",
    ),
    "rows of embeddings beside an adapter for vLLM": (
        {**host.LORA, "special_tokens": {"pad_token": "<new>"}, "spin": {"generation": {"backend": "vllm"}}},
        "the run makes 48 rows of embeddings",
    ),
    "unknown optimizer": ({"optimizer": "adamm"}, "`optimizer: adamm` is none of"),
    "unknown schedule": ({"lr_scheduler": "linnear"}, "`lr_scheduler: linnear` is none of"),
    "checkpoint that is not there": ({"resume_from_checkpoint": "none/checkpoint-7"}, "`resume_from_checkpoint: none"),
    "checkpoints of another trainer": (inside("checkpoint-500", sft_checkpoint), "checkpoint-500, saved by a run without"),
    "no such model": ({"base_model": "./quickstart/modell"}, "`base_model: ./quickstart/modell` does not exist, seen from"),
    "other frequencies with each token": (stretched, "set `sequence_len` to at most 16, or lower `spin.generation.max_new"),
    "output over the start": (output_is_the_start, "is also `base_model`"),
    "output is a file": (output_is_a_file, "taken` cannot be written to"),
    "output cannot be made": ({"output_dir": "/proc/none"}, "`output_dir: /proc/none` cannot be written to"),
}  # fmt: skip
DATA: dict[str, tuple[Change, str]] = {
    "no such file": ({"datasets": [{"path": "none.jsonl", "ds_type": "json", "type": "chat_template"}]}, "none.jsonl"),
    "no datasets": ({"datasets": None}, "datasets"),
    "unknown type": (rows({"messages": [turn("user", "w1"), turn("assistant", "w2")]}, type="chat_tmpl"), "chat_tmpl"),
    "empty file": (rows(), "datasets"),
    "no messages column": (rows({"text": "w1"}), "messages"),
    "nobody answers": (rows({"messages": [turn("user", "w1")]}), "roles_to_train"),
    "nothing is trained": (
        rows({"messages": [turn("user", "w1"), turn("assistant", "w2")]}, roles_to_train=["tool"]),
        "roles_to_train",
    ),
    "no prompt": (rows(tokens([7, 8, 6]), type=None), "there is no prompt before the answer"),
    "nothing labelled": (rows(tokens([-100] * 3), type=None), "no row of the prepared dataset has a labelled answer"),
    "preferences": (
        rows({"prompt": "w1", "chosen": [turn("assistant", "w2")], "rejected": [turn("assistant", "w3")]}),
        "has the columns `chosen` and `rejected`, which are preferences",
    ),
    "completion data": (rows({"text": "w1 w2"}, type="completion"), "there is no prompt before the answer"),
    "preferences by their type": (
        rows({"prompt": "w1", "chosen": "w2", "rejected": "w3"}, type="orpo.chat_template"),
        "holds preferences (`type: orpo.chat_template`)",
    ),
    "preferences by their fields": (
        rows({"prompt": "w1", "good": "w2", "bad": "w3"}, field_chosen="good", field_rejected="bad"),
        "holds preferences (`field_chosen: good`)",
    ),
    "rows that do not fit": ({"sequence_len": 2}, "sequence_len"),
    "no prompt held out": (
        lambda folder: {
            "test_datasets": rows(tokens([7, 8, 6]), type=None)(folder)["datasets"],
            "spin": {"eval_prompts": 8},
        },
        "`spin.eval_prompts: 8`, but none of the 1 held-out rows has a prompt",
    ),
    "everything held out": ({"val_set_size": 37}, "val_set_size"),
    "authors' format without its columns": (
        rows({"messages": [turn("user", "w1")]}, type="axolotl_spin.uclaml"),
        "real",
    ),
}  # fmt: skip

CASES: dict[str, tuple[Change, str]] = {
    **{f"spin: {name}": ({"spin": block}, message) for name, (block, message) in SPIN.items()},
    **{f"refused: {key}": ({key: value}, f"`{key}: ") for key, value in OFFENDING.items()},
    "refused: the former key of xformers": ({"xformers_attention": True}, "`attn_implementation: xformers`"),
    **{f"host: {name}": case for name, case in HOST.items()},
    **{f"data: {name}": case for name, case in DATA.items()},
}


def test_there_are_enough() -> None:
    assert len(CASES) >= 60


SAID = "\naxolotl-spin: "  # where our message stands: at the end, and once
OURS = ("spin: ", "refused: ")  # found by our own schema and checks


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.once) if name.startswith(OURS) else name for name in CASES]
)
def test_stops_at_once_and_names_the_key(
    name: str, warm: Warm, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    """What our own code finds is shown on the default host alone; that every host has the keys which we refuse, and lets
    our schema see the others, is part of its contract."""
    change, message = CASES[name]
    settings = {
        **host.config(tmp_path_factory.getbasetemp()),
        "output_dir": str(tmp_path / "out"),
        "dataset_prepared_path": None,
    }
    settings.update(change(tmp_path) if callable(change) else change)
    settings = {key: value for key, value in settings.items() if value is not None}
    (tmp_path / "wrong.yml").write_text(yaml.safe_dump(settings))
    env = host.environment(ACCELERATE_USE_CPU="true")
    code, output = warm.run("axolotl.cli.train", "wrong.yml", env=env, cwd=tmp_path, timeout=60)
    assert code == 1, output[-3000:]
    assert "Traceback" not in output and output.count(SAID) == 1, output[-3000:]
    said, _, rest = output.split(SAID)[1].partition("\n\n")
    assert message in said, said
    assert not rest.strip() or "resource_tracker" in rest, rest  # of the fork, which leaves by another way
    assert not host.loaded_a_model(tmp_path / "out")
    assert not list((tmp_path / "out").glob("spin/iteration-*"))
