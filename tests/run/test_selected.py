"""Which figure selects: what is refused, what is read from disk, and whose weights end up in `output_dir`."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from axolotl_spin.data.spread import stderr_of_difference
from axolotl_spin.disk.atomic import MARK, read_json, write_json
from axolotl_spin.disk.directory import RunDirectory
from axolotl_spin.run.keeping import remove_asides, replace_weights
from axolotl_spin.run.plan import make_plan
from axolotl_spin.run.selected import (
    Known,
    ended_at,
    eval_spread,
    has_eval_rows,
    refuse_selection,
    spread_of_play,
    stand,
    write_eval_rows,
)
from axolotl_spin.settings.spin import SpinConfig

HELD_OUT = {"val_set_size": 0.1}
ACCURACY = "gsm8k/exact_match,strict-match"


@pytest.mark.parametrize(
    ("spin", "cfg", "said"),
    [
        ({"select": "eval_loss"}, {}, "`spin.select: eval_loss` needs held-out data"),
        ({"select": "heldout_auc"}, {"val_set_size": 0}, "`spin.select: heldout_auc` needs held-out data"),
        ({"select": "heldout_auc", "eval_prompts": 0}, HELD_OUT, "`spin.eval_prompts: 0` turns it off"),
        ({"select": "loss"}, HELD_OUT, "`spin.select: loss` is no figure: write `eval_loss`, `heldout_auc`, or"),
        ({"select": "gsm8k/"}, HELD_OUT, "is no figure"),
        ({"patience": 2}, {}, "`spin.patience: 2` needs a figure to tell iterations by"),
        ({"keep": "best"}, {}, "`spin.keep: best` needs a figure to tell iterations by"),
        ({"keep": "best"}, {**HELD_OUT, "hub_model_id": "a/b"}, "does not work with `hub_model_id`"),
        ({"keep": "best"}, {**HELD_OUT, "qat": {"a": 1}}, "does not work with `qat`"),
        ({"keep": "best"}, {**HELD_OUT, "deepspeed": {"zero_optimization": {"stage": 3}}}, "gather_16bit_weights"),
    ],
)
def test_what_cannot_select_is_refused(spin: dict[str, Any], cfg: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match="spin") as error:
        refuse_selection(SpinConfig(**spin), cfg)
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("spin", "cfg"),
    [
        ({}, {}),
        ({"select": "heldout_auc", "keep": "best", "patience": 1}, {"test_datasets": [{"path": "x"}]}),
        ({"keep": "best"}, {**HELD_OUT, "adapter": "lora", "deepspeed": {"zero_optimization": {"stage": 3}}}),
    ],
)
def test_what_can_select_passes(spin: dict[str, Any], cfg: dict[str, Any]) -> None:
    refuse_selection(SpinConfig(**spin), cfg)


def test_a_tasks_metric_needs_tasks() -> None:
    """Whether one of them is it, their YAML says once it is read."""
    refuse_selection(SpinConfig(select=ACCURACY, eval_tasks=["tasks/maths.yaml"]), {})
    with pytest.raises(ValueError, match=r"needs `gsm8k` in `spin.eval_tasks`, which is not set"):
        refuse_selection(SpinConfig(select=ACCURACY), {})


# -- from disk --------------------------------------------------------------------------------------------------------


class Marks:
    """Of a run: each model's own."""

    def before(self, iteration: int) -> str:
        return f"mark before {iteration}"

    def through(self, iteration: int) -> str:
        return f"mark {iteration}"


def run_in(folder: Path, select: str, iterations: int = 3, **spin: Any) -> Any:
    rates = [1.0] * iterations
    plan = make_plan(4, global_batch=2, num_epochs=1, history=0, betas=rates, learning_rates=rates)
    settings = SpinConfig(iterations=iterations, select=select, **spin)
    directory = RunDirectory(folder)
    return SimpleNamespace(directory=directory, settings=settings, select=select, plan=plan, identity=Marks())


def test_a_tasks_metric_from_evals(tmp_path: Path) -> None:
    """More is better; 0.02 and 0.02 make 0.028, so that 0.06 is beyond noise and 0.05 is not."""
    run = run_in(tmp_path, ACCURACY, patience=1, eval_tasks=["gsm8k"], eval_limit=9)
    task, metric = ACCURACY.split("/")
    marks = {"start": "mark before 0", **{f"iteration-{index}": f"mark {index}" for index in range(3)}}
    for name, value in (("start", 0.2), ("iteration-0", 0.26), ("iteration-1", 0.31), ("iteration-2", None)):
        found = {metric: {"value": value, "stderr": 0.02, "higher_is_better": True}}
        tasks = {"other": {"metrics": {}}} if value is None else {task: {"version": 3, "samples": 9, "metrics": found}}
        asked = {"run": marks[name], "limit": 9, "chat_template": False}
        write_json(run.directory.root / name / "evals.json", {**asked, "tasks": tasks})
    known: Known = {}
    for through in range(2):  # as iterations end
        stand(run, through, known)
    standing = stand(run, 2, known)
    assert standing == stand(run, 2) and known.keys() == {None, 0, 1, 2}
    assert standing is not None and (standing.best, standing.lower) == (0, False)
    assert [one.verdict for one in standing.judged] == ["better", "noise", "missing"]
    assert standing.judged[1].difference is not None and not standing.judged[1].difference.paired
    # two steps an iteration
    assert [bool(ended_at(run, step)) for step in range(7)] == [False, False, False, False, True, False, True]
    run.settings.patience = None
    assert ended_at(run, 4) is None
    measured = read_json(run.directory.evals(0))
    for change in ({"run": "another"}, {"limit": None}, {"chat_template": True}):  # which does not compare
        write_json(run.directory.evals(0), {**measured, **change})
        standing = stand(run, 1)
        assert standing is not None and [one.verdict for one in standing.judged] == ["missing", "better"]


def test_eval_loss_from_rows_and_metrics(tmp_path: Path) -> None:
    """Rows are compared where both are there and of these very models; else the metrics' standard errors are."""
    run = run_in(tmp_path, "eval_loss", iterations=2)
    draw = np.random.default_rng(0)
    key, tokens, nll = np.arange(50), draw.integers(1, 9, 50), draw.normal(3, 1, 50)
    for iteration, gain in ((None, 0.0), (0, 0.05), (1, 0.06)):
        rows = {"key": key, "nll": tokens * (nll - gain), "tokens": tokens}
        mark = f"mark {-1 if iteration is None else iteration}"
        write_eval_rows(run.directory.eval_rows(iteration), rows, mark, step=7)
        if iteration is not None:
            loss = {"eval_loss": 3.0 - gain, "eval_loss_stderr": 0.1}
            start = {"spin/start_eval_loss": 3.0, "spin/start_eval_loss_stderr": 0.1} if iteration == 0 else {}
            write_json(run.directory.metrics(iteration), {**loss, **start})
    paths = [run.directory.eval_rows(iteration) for iteration in (None, 0)]
    assert has_eval_rows(paths[1], "mark 0", 7)
    assert not (has_eval_rows(paths[1], "mark 0", 8) or has_eval_rows(paths[1], "mark 1", 7))
    start, first = eval_spread(run.directory, None, "mark -1"), eval_spread(run.directory, 0, "mark 0")
    assert start is not None and first is not None
    assert start.value - first.value == pytest.approx(0.05)
    assert stderr_of_difference(first, start) == pytest.approx(0, abs=1e-9)  # each token gained the same
    standing = stand(run, 1)
    assert standing is not None and [one.verdict for one in standing.judged] == ["better", "better"]
    paths[1].write_bytes(b"cut")
    run.directory.eval_rows(1).unlink()
    standing = stand(run, 1)
    assert standing is not None and [one.verdict for one in standing.judged] == ["noise", "noise"]
    assert eval_spread(run.directory, None, "another run's") is None


def test_the_auc_selects_by_its_distance_from_half(tmp_path: Path) -> None:
    """0.2 and 0.8 are as far; 0.45 is nearer than both, from the other side as well."""
    run = run_in(tmp_path, "heldout_auc")
    for iteration, value in enumerate((0.8, 0.2, 0.45)):
        start = {"spin/heldout_start_auc": 0.1, "spin/heldout_start_auc_stderr": 0.02} if iteration == 0 else {}
        figures = {"spin/heldout_auc": value, "spin/heldout_auc_stderr": 0.02, **start}
        write_json(run.directory.metrics(iteration), figures)
    standing = stand(run, 2)
    assert standing is not None and standing.best == 2
    assert [one.verdict for one in standing.judged] == ["better", "noise", "better"]
    assert standing.start.value == pytest.approx(0.4)


def test_a_play_says_its_auc(tmp_path: Path) -> None:
    """Human -1, -1 nats a token against own -2, (nothing) and -0.5: 2 of 4 comparisons of the two answered prompts."""
    table = pa.table(
        {
            "human_ids": [[1, 2], [1], [1]], "own_ids": [[1], [], [1, 1]], "human_logp": [-2.0, -5.0, -1.0],
            "own_logp": [-2.0, 0.0, -1.0],
        }
    )  # fmt: skip
    found = spread_of_play(table)
    assert found is not None and found.value == 0.5 and len(found.influence) == 3 and found.influence[1] == 0
    run = run_in(tmp_path, "heldout_auc", iterations=1)
    path = run.directory.heldout(0)
    path.parent.mkdir(parents=True)
    pq.write_table(table.replace_schema_metadata({MARK: b"mark 0"}), path, write_page_checksum=True)
    write_json(run.directory.metrics(0), {"spin/heldout_auc": 0.5})
    standing = stand(run, 0)
    assert standing is not None and standing.judged[0].figure.spread is not None


def test_nothing_selects(tmp_path: Path) -> None:
    run = run_in(tmp_path, "eval_loss")
    run.select = None
    assert stand(run, 0) is None


# -- whose weights ----------------------------------------------------------------------------------------------------


def test_weights_are_replaced_also_where_the_last_model_has_other_shards(tmp_path: Path) -> None:
    """The best model's two shards come in place of the last one's three; everything else stays."""
    model, out = tmp_path / "spin" / "iteration-0" / "model", tmp_path
    model.mkdir(parents=True)
    for folder, shards, text in ((model, 2, "best"), (out, 3, "last")):
        for shard in range(shards):
            (folder / f"model-0000{shard}-of-0000{shards}.safetensors").write_text(text)
        for name in ("model.safetensors.index.json", "config.json", "training_args.bin", "tokenizer.json"):
            (folder / name).write_text(f"{text} {name}")
    (out / "checkpoint-3").mkdir()
    (out / "checkpoint-3" / "model.safetensors").write_text("last")
    (out / ".model.safetensors.0a1b2c3d").write_text("left by a kill")
    (out / ".cache").write_text("someone's")
    remove_asides(out)
    replace_weights(model, out)
    found = {path.name: path.read_text() for path in out.iterdir() if path.is_file()}
    assert found == {
        "model-00000-of-00002.safetensors": "best", "model-00001-of-00002.safetensors": "best",
        "model.safetensors.index.json": "best model.safetensors.index.json", "config.json": "last config.json",
        "training_args.bin": "last training_args.bin", "tokenizer.json": "last tokenizer.json", ".cache": "someone's",
    }  # fmt: skip
    assert (out / "checkpoint-3" / "model.safetensors").read_text() == "last"
    assert sorted(path.name for path in model.glob("model-*")) == [
        f"model-0000{i}-of-00002.safetensors" for i in (0, 1)
    ]
