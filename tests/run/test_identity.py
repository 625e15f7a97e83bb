"""What makes two runs one: every setting that is not listed as harmless, whichever version of this package began them."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import axolotl.integrations
import pytest
from axolotl.utils.schemas.config import AxolotlInputConfig
from rows import load

from axolotl_spin.monitor.about import LEFT_OUT, without_secrets
from axolotl_spin.run.compared import NOT_COMPARED, reasons
from axolotl_spin.run.identity import Identity
from axolotl_spin.run.prepare import SpinRun

# what a plan.json of version 0.1 held of the host's keys
FIRST_KEYS = (
    "base_model", "revision_of_model", "adapter", "lora_r", "lora_alpha", "lora_target_modules",
    "lora_target_parameters", "lora_target_linear", "lora_modules_to_save", "peft_layers_to_transform",
    "lora_model_dir", "peft_use_dora", "peft_use_rslora", "peft_init_lora_weights", "load_in_4bit", "load_in_8bit",
    "bf16", "fp16", "sequence_len", "lr_scheduler", "lr_scheduler_kwargs", "cosine_min_lr_ratio",
    "cosine_constant_lr_ratio", "lr_div_factor", "embedding_lr", "embedding_lr_scale", "lr_groups",
    "loraplus_lr_ratio", "loraplus_lr_embedding", "optimizer", "optim_args", "optim_target_modules", "adam_beta1",
    "adam_beta2", "adam_epsilon", "weight_decay", "max_grad_norm", "unfrozen_parameters", "seed",
    "curriculum_sampling",
)  # fmt: skip
FIRST_SPIN = (
    "loss", "sft_weight", "restart_optimizer", "max_prompts", "turns", "generation.max_new_tokens",
    "generation.temperature", "generation.top_p", "generation.top_k", "generation.batch_size", "generation.seed",
)  # fmt: skip


def changes(first: SpinRun, second: SpinRun) -> list[str]:
    kept = json.loads(json.dumps({**first.identity.to_json(), **first.plan.to_json()}))
    return [line.strip() for line in second.identity.changes(kept)]


@pytest.mark.once
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("overrides_of_model_config", {"rope_theta": 5e5}),
        ("special_tokens", {"unk_token": "<pad>"}),
        ("eot_tokens", ["<|end|>"]),
        ("lora_rank_pattern", {"q_proj": 2}),
        ("bnb_config_kwargs", {"bnb_4bit_use_double_quant": True}),
        ("embeddings_skip_upcast", True),
    ],
)
def test_what_changes_the_result_is_another_run(tmp_path: Path, key: str, value: Any) -> None:
    [line] = changes(load(tmp_path)[0], load(tmp_path, **{key: value})[0])
    assert line == f"{key}: None -> {value!r}"


@pytest.mark.parametrize(
    "harmless",
    [
        {"spin": {"generation": {"batch_size": 3}}},
        {"gradient_checkpointing": True},
        {"attn_implementation": "sdpa"},
        {"use_tensorboard": True, "wandb_name": "b"},
        {"dataloader_num_workers": 3, "dataset_num_proc": 2},
        {"loss_watchdog_threshold": 3.0, "loss_watchdog_patience": 2},
        {"micro_batch_size": 1, "gradient_accumulation_steps": 4},
        {"tf32": True},
    ],
)
def test_what_does_not_change_the_result_is_the_same_run(tmp_path: Path, harmless: dict[str, Any]) -> None:
    first = load(tmp_path, spin={"generation": {"batch_size": 32}})[0]
    second = load(tmp_path, **{"spin": {"generation": {"batch_size": 32}}, **harmless})[0]
    assert changes(first, second) == []
    assert first.identity.hash == second.identity.hash


def test_answers_may_have_a_seed_of_their_own(tmp_path: Path) -> None:
    """Order, split and everything else that is drawn keep the run's."""
    for generation, seed in (({}, 7), ({"seed": 5}, 5), ({"seed": 0}, 0)):
        run = load(tmp_path, spin={"generation": generation})[0]
        assert (run.sampling_seed, run.seed) == (seed, 7)


@pytest.mark.once
def test_benchmarks_do_not_change_the_result(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"question": "w1", "answer": "w2"}\n')
    task = {
        "task": "one",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "exact_match"}],
        "generation_kwargs": {"max_gen_toks": 8},
    }
    path = tmp_path / "one.yaml"
    path.write_text(json.dumps(task))
    asked = {"eval_tasks": [str(path)], "eval_limit": 3, "eval_chat_template": True, "select": "one/exact_match"}
    assert not changes(load(tmp_path, spin={})[0], load(tmp_path, spin=asked)[0])


def test_no_credential_is_noted() -> None:
    """`plan.json` lies beside what a run uploads and shows: no secret of the host or of its plugins is in it."""
    folder = Path(axolotl.integrations.__file__).parent
    names = {key for key in AxolotlInputConfig.model_fields if without_secrets("some text", key) == LEFT_OUT}
    for path in folder.glob("*/args.py"):
        # read, since importing some takes what is not installed
        keys = re.findall(r"^    (\w+): (?:str|Optional\[str\])", path.read_text(), flags=re.MULTILINE)
        names |= {key for key in keys if without_secrets("some text", key) == LEFT_OUT}
    # within the block of a plugin that brings its own trainer, so that it is refused; and the name of a variable
    names -= {"api_key", "api_token_env"}
    assert {"swanlab_api_key", "swanlab_lark_secret", "swanlab_lark_webhook_url", "comet_api_key"} <= names
    assert [key for key in sorted(names) if not reasons(key)] == []


def test_a_key_of_a_coming_host_is_compared() -> None:
    assert reasons("a_key_that_no_host_has_yet") == []


def test_the_keys_of_the_objective_and_the_plan(tmp_path: Path) -> None:
    """At their defaults they are as if they were not there; beyond them each is another run, and says what differs."""
    plain = load(tmp_path)[0]
    spelt_out = {"loss": "sigmoid", "beta": 0.1, "length_normalized": False, "schedule_epochs": 1}
    same = load(tmp_path, spin={"generation": {"max_new_tokens": 10}, **spelt_out})[0]
    base = load(tmp_path, spin={"generation": {"max_new_tokens": 10}})[0]
    assert changes(base, same) == [] and base.identity.hash == same.identity.hash
    assert not [key for key in plain.identity.fixed if key.startswith("spin.") and "generation" not in key]
    for key, value, lines in (
        ("length_normalized", True, ["spin.length_normalized: False -> True"]),
        ("prompts_per_iteration", 5, ["spin.prompts_per_iteration: None -> 5"]),
        ("schedule_epochs", 3, ["spin.schedule_epochs: None -> 3"]),
        ("loss", "space", ["spin.loss: 'sigmoid' -> 'space'", "spin.beta: 0.1 -> 1.0"]),
    ):
        other = load(tmp_path, spin={"generation": {"max_new_tokens": 10}, key: value})[0]
        assert changes(base, other) == lines
        assert other.identity.hash != base.identity.hash


def first_version(run: SpinRun, cfg: Any, **kept: Any) -> dict[str, Any]:
    """Returns the plan.json that version 0.1 wrote, put together as it did."""
    values = run.identity.values
    special = [key for key in values if key.startswith(("data (", "global batch ("))]
    fixed = {
        **{key: values[key] for key in special},
        **{key: cfg.get(key) for key in FIRST_KEYS},
        **{f"spin.{key}": values[f"spin.{key}"] for key in FIRST_SPIN},
        **kept,
    }
    fixed = json.loads(json.dumps(fixed))
    return {"fixed": fixed, "planned": run.identity.planned, **run.plan.to_json(), "completed_steps": None}


def digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def test_a_run_of_the_first_version_goes_on(tmp_path: Path) -> None:
    """Compared on the keys that it has, and known by the marks that it left, whatever its batch size was."""
    run, _, cfg = load(tmp_path)
    plan = first_version(run, cfg, **{"spin.generation.batch_size": 7})
    assert len(plan["fixed"]) == 2 + len(FIRST_KEYS) + len(FIRST_SPIN)
    run.directory.root.mkdir(parents=True, exist_ok=True)
    run.directory.plan.write_text(json.dumps(plan))
    again, _, _ = load(tmp_path, eot_tokens=["<|end|>"])  # not among its keys
    fixed, iterations = plan["fixed"], plan["iterations"]
    assert again.identity.hash == digest(fixed, iterations)
    first = {"rows": iterations[0]["rows"], "kept": iterations[0]["kept_rows"]}
    assert again.identity.before(0) == digest(fixed, [first])
    assert again.identity.through(1) == digest(fixed, iterations[:2])
    again.write_plan()
    assert json.loads(run.directory.plan.read_text())["fixed"] == fixed  # and so at every later start
    load(tmp_path)
    with pytest.raises(ValueError, match=r"adam_beta2: None -> 0.99"):
        load(tmp_path, adam_beta2=0.99)


def test_a_key_that_a_later_version_lists_as_harmless_keeps_the_marks() -> None:
    kept = {"identity": 2, "fixed": {"seed": 1, "logging_steps": 5}, "planned": {}, "iterations": []}
    now = Identity({"seed": 1}, {}, [], {"seed": 1})
    assert now.changes(kept) == [] and now.like(kept).fixed == kept["fixed"]


def test_reasons_are_told_apart() -> None:
    """No key stands under two of them."""
    names = [name for group in NOT_COMPARED.values() for name in group]
    assert len(names) == len(set(names))
    assert [name for name in names if "*" not in name and len(reasons(name)) != 1] == []
