"""The commands that a user types, with one YAML: `axolotl train` runs as it is typed.

The others run in forks of a process that has imported the host, through the same command line.
"""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import host
import pytest
import yaml
from axolotl.cli.art import AXOLOTL_LOGO
from transformers import AutoModelForCausalLM
from warm import Warm

pytestmark = pytest.mark.host


def forked(
    warm: Warm, settings: dict, *command: str, module: str = "axolotl.cli.main", typed: Path | None = None
) -> host.Run:
    """Runs `axolotl`, or another module, with a command in a fork.

    Args:
        warm: What forks.
        settings: The config.
        command: Arguments; `{config}` stands for the config's path.
        module: The module.
        typed: A file with what a user types.
    """
    path = host.write(settings)
    env = host.environment(ACCELERATE_USE_CPU="true")
    arguments = [argument.replace("{config}", str(path)) for argument in command]
    code, output = warm.run(module, *arguments, env=env, cwd=path.parent, typed=typed)
    return host.Run(code, output, Path(settings["output_dir"]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("commands")


@pytest.fixture(scope="module")
def lora_run(folder: Path) -> tuple[dict, host.Run]:
    """`axolotl train` with LoRA, held-out data, packing asked for, and evaluations and saves counted per epoch."""
    changes = {
        **host.LORA,
        "output_dir": str(folder / "lora"),
        "val_set_size": 5,
        "sample_packing": True,
        "attn_implementation": "sdpa",
        "evals_per_epoch": 1,
        "saves_per_epoch": 1,
        "num_epochs": 2,
        "bf16": False,
        "gradient_checkpointing": True,
    }
    settings = {**host.config(folder), **changes}
    command = ("-m", "axolotl.cli.main", "train", "{config}")
    run = host.start(settings, *command, env={"ACCELERATE_USE_CPU": "true"})
    assert run.code == 0, run.output[-6000:]
    return settings, run


def test_axolotl_train_reports_what_it_does(lora_run: tuple[dict, host.Run]) -> None:
    _, run = lora_run
    assert host.loaded_a_model(run.out)  # which other tests expect not to be so
    for phrase in (
        "iteration 0: generated 32 answers in",
        "iteration 0: scored 32 pairs in",
        "iteration 1: training on 64 pairs (32 kept from before), 2 epoch(s), 32 steps",
        "iteration 1: trained 32 steps in",
        "Self-play iterations",
        "each iteration's lora:",
        "--lora-model-dir=",
    ):
        assert phrase in run.output, phrase
    assert run.output.rindex("try it: axolotl inference") > run.output.rindex("Model successfully saved")


def test_public_metric_names_reach_the_hosts_logging(lora_run: tuple[dict, host.Run]) -> None:
    _, run = lora_run
    rows = run.logs()
    trained = [row for row in rows if "loss" in row]
    for name in ("chosen", "rejected", "margins", "accuracies"):
        assert all(f"rewards/{name}" in row for row in trained)
    for row in trained:
        assert row["rewards/margins"] == pytest.approx(row["rewards/chosen"] - row["rewards/rejected"], abs=1e-5)
        assert row["logps/chosen"] < 0 and row["logps/rejected"] < 0
        assert "ppl" not in row
    begun = [row for row in rows if "spin/generation_seconds" in row]
    assert [row["spin/iteration"] for row in begun] == [0, 1]
    for name in (
        "beta", "generation_tokens_per_second", "scoring_seconds", "rejected_length", "chosen_length", "truncated",
        "empty", "identical",
    ):  # fmt: skip
        assert all(f"spin/{name}" in row for row in begun), name
    assert sum("spin/training_seconds" in row for row in rows) >= 1
    metrics = run.metrics(1)
    assert {"eval_loss", "loss_first", "loss_last", "spin/training_seconds", "rewards/margins"} <= set(metrics)


def test_evaluations_and_saves_are_spread_over_the_iterations(lora_run: tuple[dict, host.Run]) -> None:
    """16 steps in iteration 0 and 32 in iteration 1, four epochs: every 12 steps, and at each iteration's end."""
    _, run = lora_run
    saved = sorted(int(path.name.split("-")[1]) for path in run.out.glob("checkpoint-*"))
    assert saved == [16, 24, 36, 48]  # the host's rotation keeps four: 12 is gone
    evaluated = sorted({row["step"] for row in run.logs() if "eval_loss" in row})
    assert {0, 12, 16, 24, 36, 48} == set(evaluated)


def test_each_iterations_adapter_and_the_files_around_it(lora_run: tuple[dict, host.Run]) -> None:
    _, run = lora_run
    spin = run.out / "spin"
    names = sorted(
        str(path.relative_to(spin)) for path in spin.rglob("*") if path.is_file() and "model" not in path.parts
    )
    of_each = ("eval_rows.parquet", "heldout.parquet", "metrics.json", "pairs.parquet")
    assert names == [
        *("about.json", "best.json"),
        *(f"iteration-{iteration}/{name}" for iteration in range(2) for name in of_each),
        *("log.jsonl", "plan.json", "report.html", "run.lock", "start/eval_rows.parquet", "start/heldout.parquet"),
    ]
    for iteration in range(2):
        assert (spin / f"iteration-{iteration}" / "model" / "adapter_model.safetensors").exists()
    plan = json.loads((spin / "plan.json").read_text())
    assert [entry["steps"] for entry in plan["iterations"]] == [16, 32]
    assert len(plan["hash"]) == 64


def test_merge_lora_takes_the_same_yaml(lora_run: tuple[dict, host.Run], warm: Warm) -> None:
    settings, run = lora_run
    merged = forked(warm, settings, "merge-lora", "{config}")
    assert merged.code == 0, merged.output[-4000:]
    AutoModelForCausalLM.from_pretrained(run.out / "merged")


def test_inference_takes_the_same_yaml(lora_run: tuple[dict, host.Run], warm: Warm, tmp_path: Path) -> None:
    """It prints the prompt and then what the adapter answers."""
    settings, run = lora_run
    (tmp_path / "typed").write_text("w1 w2 w3")
    command = ("inference", "{config}", "--launcher", "python", f"--lora-model-dir={run.out}")
    done = forked(warm, settings, *command, typed=tmp_path / "typed")
    assert done.code == 0, done.output[-4000:]
    _, prompt, answer = done.output.rpartition("<|user|> w1 w2 w3 <|end|> <|assistant|>")
    assert prompt and re.match(r"(\s*(w\d+|<\S+>))+", answer), answer


def test_evaluate_takes_the_same_yaml(lora_run: tuple[dict, host.Run], warm: Warm) -> None:
    """It finds the loss on the held-out rows that the run itself found at its end."""
    settings, run = lora_run
    done = forked(warm, {**settings, "lora_model_dir": str(run.out)}, "evaluate", "{config}", "--launcher", "python")
    assert done.code == 0, done.output[-4000:]
    with open(run.out / "eval_summary.csv") as file:
        found = {row["metric"]: row["validation"] for row in csv.DictReader(file)}
    assert float(found["loss"]) == pytest.approx(run.metrics(1)["eval_loss"], rel=1e-4)


@pytest.mark.once
def test_table_of_a_run_on_disk(lora_run: tuple[dict, host.Run], warm: Warm) -> None:
    settings, run = lora_run
    done = forked(warm, settings, "table", str(run.out), module="axolotl_spin")
    assert done.code == 0
    assert "Self-play iterations" in done.output and "0.6931" in done.output
    nothing = forked(warm, settings, "table", str(run.out.parent), module="axolotl_spin")
    assert nothing.code != 0 and "holds no SPIN run" in nothing.output


def test_report_of_a_run_on_disk(lora_run: tuple[dict, host.Run], warm: Warm) -> None:
    settings, run = lora_run
    page = run.out / "spin" / "report.html"
    assert "complete: 48 steps" in page.read_text()  # written by the run itself
    page.unlink()
    done = forked(warm, settings, "report", str(run.out), module="axolotl_spin")
    assert done.code == 0 and str(page) in done.output
    assert "complete: 48 steps" in page.read_text() and "lora_r: 4" in page.read_text()


def test_preprocess_and_plan_take_the_same_yaml_and_share_sfts_cache(folder: Path, warm: Warm) -> None:
    settings = {
        **host.config(folder),
        "output_dir": str(folder / "cache"),
        "dataset_prepared_path": str(folder / "cache-p"),
    }
    done = forked(warm, settings, "preprocess", "{config}")
    assert done.code == 0, done.output[-4000:]
    cached = [path.name for path in (folder / "cache-p").iterdir()]
    command = ("axolotl.cli.main", "spin", "plan", str(folder / "cache.yml"), "--json")
    env, errors = host.environment(ACCELERATE_USE_CPU="true"), folder / "cache.err"
    code, output = warm.run(*command, env=env, cwd=folder, errors=errors)
    assert code == 0, errors.read_text()[-4000:]
    # the host prints its banner before it imports a plugin's command
    banner, brace, rest = output.partition("{")
    assert banner == f"{AXOLOTL_LOGO}\n" and f"axolotl_spin plan {command[3]} --json" in errors.read_text()
    plan = json.loads(brace + rest)
    assert [(e["rows"], e["steps"], e["learning_rate"], e["beta"], e["epochs"]) for e in plan["iterations"]] == [
        (37, 10, 1e-3, 0.1, 1), (74, 19, 1e-3, 0.1, 1),
    ]  # fmt: skip
    sft = {key: value for key, value in settings.items() if key not in ("rl", "spin")}
    trained = host.train({**sft, "output_dir": str(folder / "sft")}, by=warm)
    assert [path.name for path in (folder / "cache-p").iterdir()] == cached
    # with SPIN off nothing of ours ran or was left
    assert "[axolotl_spin." not in trained.output and not (folder / "sft" / "spin").exists()


def test_a_second_start_with_other_settings_is_refused_with_both_values(
    lora_run: tuple[dict, host.Run], warm: Warm
) -> None:
    settings, run = lora_run
    before = (run.out / "spin" / "plan.json").read_bytes()
    changed = {**settings, "spin": {**settings["spin"], "beta": 0.2}, "seed": 8}
    done = host.train(changed, by=warm, fails=True)
    assert "spin.beta: 0.1 -> 0.2" in done.output and "seed: 7 -> 8" in done.output
    assert "spin.iterations" not in done.output
    assert not host.loaded_a_model(run.out)
    assert (run.out / "spin" / "plan.json").read_bytes() == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"spin": {"iteration": 2}}, "iteration"),
        ({"relora": True}, "adapter: lora"),
        ({"datasets": "prompt_free"}, "there is no prompt before the answer"),
    ],
)
def test_wrong_configs_stop_the_command_before_a_model_loads(
    folder: Path, warm: Warm, change: dict, message: str
) -> None:
    settings = {**host.config(folder), "output_dir": str(folder / "wrong"), **change}
    if settings["datasets"] == "prompt_free":
        rows = folder / "prompt_free.jsonl"
        rows.write_text(json.dumps({"input_ids": [7, 8, 6], "attention_mask": [1] * 3, "labels": [7, 8, 6]}) + "\n")
        settings["datasets"] = [{"path": str(rows), "ds_type": "json", "type": None}]
    done = host.train(settings, by=warm, fails=True)
    assert message in done.output
    assert not host.loaded_a_model(folder / "wrong")
    assert yaml.safe_load((folder / "wrong.yml").read_text())["rl"] == "spin"
