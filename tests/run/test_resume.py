"""Starting again with a changed config, from a checkpoint that the user names, or from the beginning."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import host
import pytest
import yaml
from click.testing import CliRunner
from recovery import CHANGES, differences, outcome, settings_in
from warm import Warm

from axolotl_spin.cli import spin as spin_command
from axolotl_spin.disk.atomic import read_json, remove_folder, write_json
from axolotl_spin.run import checkpoints
from axolotl_spin.run.checkpoints import Checkpoint, read_checkpoint
from axolotl_spin.run.identity import Identity
from axolotl_spin.run.prepare import Launch
from axolotl_spin.run.resume import _check_launch

pytestmark = pytest.mark.host

ENV = host.environment(ACCELERATE_USE_CPU="true")
Start = Callable[..., tuple[int, str]]


@pytest.fixture
def start(warm: Warm, shared: Path, tmp_path: Path) -> Start:
    """A function that starts the run in `tmp_path` with changed settings."""

    def run(kill: str = "", **changes: Any) -> tuple[int, str]:
        settings = {**settings_in(tmp_path, shared), **changes}
        (tmp_path / "run.yml").write_text(yaml.safe_dump(settings))
        return warm.run("axolotl.cli.train", "run.yml", env={**ENV, "SPIN_KILL": kill}, cwd=tmp_path)

    return run


def spin(**changes: Any) -> dict[str, Any]:
    return {"iterations": 2, "generation": {"max_new_tokens": 8, "batch_size": 4}, **changes}


def completes(done: tuple[int, str]) -> str:
    assert done[0] == 0, done[1][-6000:]
    return done[1]


@pytest.mark.once
def test_iterations_may_be_appended(start: Start, whole: dict, shared: Path, tmp_path: Path) -> None:
    """A complete run that is given a third iteration ends as one that had three from the start.

    The host's `learning_rate` may be another by then, where `spin.learning_rate` has the first iterations' as they were.
    This and the next follow from our plan alone; how a host resumes is what `test_a_named_checkpoint` shows.
    """
    shutil.copytree(shared / "whole" / "out", tmp_path / "out")
    changes = {"spin": spin(iterations=3, learning_rate=[1e-3, 1e-3, 5e-4]), "learning_rate": 5e-4}
    output = completes(start(**changes))
    assert "going on from" in output and "iteration 2: generated 16 answers" in output
    assert "iteration 1: generated" not in output
    extended = outcome(tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    completes(start(**changes))
    # both stop after iteration 1's end; the first run's rotation there is older by one
    assert not [name for name in differences(extended, outcome(tmp_path / "out")) if name != "checkpoints"]


@pytest.mark.once
def test_iterations_may_be_left_out_at_the_end(start: Start, whole: dict, tmp_path: Path) -> None:
    """Stopped within the third of three iterations, a run that now has two is complete after them."""
    assert start("iteration 1/first epoch", spin=spin(iterations=3))[0] != 0
    completes(start())
    assert not differences(outcome(tmp_path / "out"), whole)


def test_harmless_changes_are_allowed(start: Start, whole: dict, tmp_path: Path) -> None:
    """And they are put into practice: what is left of the run is saved and logged at the new steps."""
    assert start("iteration 1/first epoch")[0] != 0
    changes = {"save_steps": 5, "save_total_limit": 3, "logging_steps": 1, "micro_batch_size": 4}
    completes(start(**changes, gradient_accumulation_steps=1))
    found = outcome(tmp_path / "out")
    assert found["checkpoints"] == ["checkpoint-15", "checkpoint-20", "checkpoint-24"]
    assert {row["step"] for row in found["logs"] if "loss" in row} >= set(range(17, 25))
    assert not [name for name in differences(found, whole) if name.startswith("pairs 0")]
    assert found["pairs 1"]["rejected_ids"] == whole["pairs 1"]["rejected_ids"]
    for name, tensor in whole["weights"].items():  # the micro-batches are others, so the sums round differently
        assert tensor.allclose(found["weights"][name], atol=1e-5)


@pytest.mark.once
@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"seed": 8}, "seed: 7 -> 8"),
        ({"learning_rate": 2e-3}, "learning_rate: 0.001 -> 0.002"),
        ({"num_epochs": 3}, "num_epochs: 2.0 -> 3.0"),
        ({"warmup_steps": 3}, "warmup_steps: 2 -> 3"),
        ({"optimizer": "rmsprop"}, "optimizer: 'adamw_torch' -> 'rmsprop'"),
        ({"sequence_len": 63}, "sequence_len: 64 -> 63"),
        ({"gradient_accumulation_steps": 4}, "global batch (micro_batch_size x gradient_accumulation_steps x ranks): 4 -"),
        ({"val_set_size": 4}, "data (prompts and human answers as token ids): '"),
        ({"spin": spin(beta=[0.1, 0.2])}, "spin.beta: 0.1 -> [0.1, 0.2]"),
        ({"spin": spin(history=0)}, "spin.history: 1 -> 0"),
        ({"spin": spin(generation={"max_new_tokens": 8, "batch_size": 4, "top_k": 9})}, "spin.generation.top_k: None -> 9"),
    ],
)  # fmt: skip
def test_a_change_of_what_results_depend_on_is_refused(
    changes: dict, line: str, start: Start, whole: dict, shared: Path, tmp_path: Path
) -> None:
    """Our own comparison; that every host has the keys which it reads is part of the contract."""
    shutil.copytree(shared / "whole" / "out", tmp_path / "out")
    code, output = start(**changes)
    assert code == 1
    end = output[output.rindex("holds a run with other settings") :]
    assert f"\n  {line}" in end
    changed = [text for text in end.splitlines() if text.startswith("  ") and " -> " in text]
    # another batch has other steps, other data other lengths; nothing else is named
    assert len(changed) == 1, changed
    assert not host.loaded_a_model(tmp_path / "out")


@pytest.mark.once
def test_a_named_checkpoint(start: Start, whole: dict, tmp_path: Path) -> None:
    """What lies beyond it is set aside, and the run ends as before. It notes an earlier one as the best, as under
    `metric_for_best_model`: with a limit of one the host would remove the last in favour of that."""
    assert start("iteration 1/second epoch", save_total_limit=20)[0] != 0
    checkpoint = tmp_path / "out" / "checkpoint-6"
    (left := tmp_path / "out" / "checkpoint-18" / "global_step18_universal").mkdir()  # by a start that was killed
    state, mark = (read_json(checkpoint / name) for name in ("trainer_state.json", "spin.json"))
    state |= {
        "best_global_step": 3,
        "best_metric": 0.1,
        "best_model_checkpoint": str(tmp_path / "out" / "checkpoint-3"),
    }
    write_json(checkpoint / "trainer_state.json", state)
    mark["files"]["trainer_state.json"] = (checkpoint / "trainer_state.json").stat().st_size
    write_json(checkpoint / "spin.json", mark)
    once = {"metric_for_best_model": "eval_loss", "save_total_limit": 1}
    output = completes(start(resume_from_checkpoint=str(checkpoint), **once))
    assert f"going on from {checkpoint} (step 6 of 24)" in output
    found = outcome(tmp_path / "out")
    assert found["checkpoints"] == ["checkpoint-24"] and differences(found, whole) == ["checkpoints"]
    replaced = tmp_path / "out" / "spin" / "replaced-1"
    assert (replaced / "checkpoint-18").exists() and not (replaced / "checkpoint-18" / left.name).exists()
    assert (replaced / "iteration-1" / "pairs.parquet").exists()


def test_from_the_beginning(start: Start, whole: dict, tmp_path: Path) -> None:
    """The first opponent is the base model, so its answers serve again; the rest is set aside."""
    assert start("iteration 1/second epoch")[0] != 0
    output = completes(start(auto_resume_from_checkpoints=False))
    assert "going on from" not in output and "using the pairs in" in output
    assert "iteration 0: generated" not in output and "iteration 1: generated" in output
    assert not differences(outcome(tmp_path / "out"), whole)


@pytest.mark.once
def test_an_earlier_runs_play_is_not_taken_for_this_ones(start: Start, tmp_path: Path) -> None:
    """Started from the beginning and stopped again, the first iteration has no held-out play yet."""
    assert start("iteration 1/first epoch")[0] != 0
    folder = tmp_path / "out" / "spin" / "iteration-0"
    assert (folder / "heldout.parquet").exists()
    assert start("train/first step taken", auto_resume_from_checkpoints=False)[0] != 0
    assert not (folder / "heldout.parquet").exists()
    assert (tmp_path / "out" / "spin" / "replaced-1" / "iteration-0" / "heldout.parquet").exists()
    played = [name for name in read_json(folder / "metrics.json") if "heldout" in name]
    assert played and all(name.startswith("spin/heldout_start_") for name in played)


def test_a_checkpoint_without_an_optimizer_is_not_resumed_from(start: Start, tmp_path: Path) -> None:
    assert start("iteration 1/first epoch", save_only_model=True)[0] != 0
    assert len(list((tmp_path / "out").glob("checkpoint-*"))) == 2
    code, output = start(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-8"))
    assert code == 1 and "saved without the optimizer's state: with `save_only_model: true`" in output


@pytest.mark.once
def test_an_optimizer_that_cannot_be_saved_is_needed_within_an_iteration_alone(
    start: Start, whole: dict, tmp_path: Path
) -> None:
    """The host warns and goes on. Of the checkpoints until step 18 that of step 8 ends an iteration, where it restarts."""
    plugins = [*CHANGES["plugins"], "unsaved.UnsavedPlugin"]
    assert start("iteration 1/second epoch", plugins=plugins)[0] != 0
    left = sorted(int(path.name.split("-")[1]) for path in (tmp_path / "out").glob("checkpoint-*"))
    assert left == [8, 18]  # the newest, and the newest that can be resumed from
    output = completes(start(plugins=plugins))
    assert "going on from" in output and "(step 8 of 24)" in output
    assert not differences(outcome(tmp_path / "out"), whole)
    within = str(tmp_path / "out" / whole["checkpoints"][-2])
    code, output = start(plugins=plugins, resume_from_checkpoint=within)
    assert code == 1 and "saved without the optimizer's state" in output


@pytest.mark.once
def test_a_smaller_batch_loses_no_answer_and_changes_none(start: Start, whole: dict, tmp_path: Path) -> None:
    """What is advised where memory runs out: two chunks of four answers are there, the other eight come in threes."""
    assert start("generate/chunk whole")[0] != 0
    chunks = tmp_path / "out" / "spin" / "iteration-0" / "chunks"
    assert [path.name for path in sorted(chunks.glob("0*"))] == [f"00000{index}.parquet" for index in range(3)]
    output = completes(start(spin=spin(generation={"max_new_tokens": 8, "batch_size": 3})))
    assert "12 of 16 prompts are already answered" in output and "iteration 0: generated 4 of 16 answers" in output
    assert not differences(outcome(tmp_path / "out"), whole)
    [rate] = [
        row["spin/generation_tokens_per_second"]
        for row in host.Run(0, "", tmp_path / "out").logs()
        if "spin/generation_seconds" in row and row["spin/iteration"] == 0
    ]
    drawn = sum(map(len, whole["pairs 0"]["rejected_ids"]))
    seconds = host.Run(0, "", tmp_path / "out").metrics(0)["spin/generation_seconds"]
    assert rate * seconds < drawn / 2  # tokens of this start alone


NEW = {
    "tokens": ["<new-1>", "<new-2>"],
    "plugins": ["faults.FaultPlugin", "drawn.UnseededPlugin", *host.OURS],
}


@pytest.mark.once
def test_rows_of_added_tokens_are_the_same_at_every_start(start: Start, shared: Path, tmp_path: Path) -> None:
    """Host 0.19 draws them unseeded: after a kill the rest of the answers would be another model's."""
    assert start("generate/chunk whole", **NEW)[0] != 0
    output = completes(start(**NEW))
    assert "12 of 16 prompts are already answered" in output
    stopped = outcome(tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    completes(start(**NEW))
    assert not differences(stopped, outcome(tmp_path / "out"))


@pytest.mark.once
@pytest.mark.parametrize(
    ("kill", "message"),
    [
        ("generate/all chunks whole", "000003.parquet was answered by other weights than the model has at this start"),
        (
            "train/first micro-batch",
            "pairs.parquet was made by other weights than the model has at this start: they are",
        ),
    ],
)
def test_what_other_weights_have_made_is_made_again(kill: str, message: str, start: Start, tmp_path: Path) -> None:
    """Weights that come back at no start, such as an unseeded plugin's: no answer of theirs is kept, and it is said."""
    plugins = ["faults.FaultPlugin", "drawn.DrawnPlugin", *host.OURS]
    assert start(kill, plugins=plugins)[0] != 0
    output = completes(start(plugins=plugins))
    assert message in output and "iteration 0: generated 16 answers" in output
    assert host.Run(0, "", tmp_path / "out").metrics(0)["loss_first"] == pytest.approx(math.log(2), abs=1e-5)


WATCHDOG = {"loss_watchdog_threshold": 0.1, "loss_watchdog_patience": 2}  # ln 2 at step 2, seen after the next ones


def test_a_run_that_the_host_ends_early_is_not_complete(start: Start, whole: dict, tmp_path: Path) -> None:
    """Nothing of it is lost: it goes on from the step at which it was ended, and ends as one that never was."""
    out = tmp_path / "out"
    output = completes(start(**WATCHDOG))
    about = read_json(out / "spin" / "about.json")
    step = about["stopped"]["step"]
    assert about["completed"] is None and 3 < step < 8  # within iteration 0
    end = output[output.rindex("Self-play iterations") :]
    assert f"the host ended training at step {step} of 24" in end
    assert f"goes on from {out / f'checkpoint-{step}'}, and nothing is lost" in end
    assert f"model of step {step}: {out}" in end and "go on: axolotl train run.yml" in end and "final model" not in end
    assert read_json(out / "spin" / "plan.json")["completed_steps"] is None
    assert f"stopped: step {step} of 24" in (out / "spin" / "report.html").read_text()
    shown = CliRunner().invoke(spin_command, ["table", str(out)])
    assert shown.exit_code == 0 and f"stopped: step {step} of 24" in shown.output
    output = completes(start())
    assert "going on from" in output and f"checkpoint-{step} (step {step} of 24)" in output
    assert not differences(outcome(out), whole)
    about = read_json(out / "spin" / "about.json")
    assert about["completed"] and about["stopped"] is None
    assert "complete: 24 steps" in CliRunner().invoke(spin_command, ["table", str(out)]).output


@pytest.mark.once
def test_an_early_end_without_checkpoints_says_what_is_lost(start: Start, tmp_path: Path) -> None:
    output = completes(start(**WATCHDOG, save_strategy="no", save_steps=None))
    assert "there is no checkpoint to go on from, so the next start begins at step 0" in output
    assert read_json(tmp_path / "out" / "spin" / "plan.json")["completed_steps"] is None


# -- without a host ---------------------------------------------------------------------------------------------------


def identity(betas: list[float], **fixed: Any) -> Identity:
    iterations = [{"beta": beta, "rows": 4 * (1 + i), "kept_rows": 4 * i} for i, beta in enumerate(betas)]
    return Identity({"seed": 1, **fixed}, {"spin.beta": betas}, iterations)


def test_artifacts_depend_on_the_iterations_before_them() -> None:
    short, long, other = identity([1, 2]), identity([1, 2, 3]), identity([9, 2])
    assert [short.before(i) for i in range(2)] == [long.before(i) for i in range(2)]
    assert [short.through(i) for i in range(2)] == [long.through(i) for i in range(2)]
    assert short.before(0) == other.before(0) and short.before(1) != other.before(1)
    assert short.through(0) != other.through(0)
    assert short.hash != long.hash
    assert short.before(0) != identity([1, 2], seed=2).before(0)
    assert len({short.before(0), short.before(1), short.through(0), short.through(1)}) == 4
    assert short.through(1) == short.hash


def test_changes_name_keys_and_both_values() -> None:
    kept = {**identity([1, 2]).to_json(), "iterations": identity([1, 2]).iterations}
    assert identity([1, 2]).changes(kept) == identity([1, 2, 3]).changes(kept) == identity([1]).changes(kept) == []
    assert identity([1, 3]).changes(kept) == ["  spin.beta: [1, 2] -> [1, 3]"]
    assert identity([1, 2], seed=2).changes(kept) == ["  seed: 1 -> 2"]


@pytest.mark.parametrize(
    ("saved", "now", "message"),
    [
        (Launch(2, None), Launch(1, None), ""),
        (Launch(2, "FSDP2"), Launch(4, "FSDP2"), ""),
        (Launch(2, "ZeRO-3"), Launch(2, "ZeRO-3"), ""),
        (Launch(2, "ZeRO-3"), Launch(4, "ZeRO-3"), ""),
        (Launch(2, "ZeRO-0"), Launch(4, "ZeRO-0"), "saved on 2 ranks, .* only shards of ZeRO-1, ZeRO-2 and ZeRO-3"),
        (Launch(2, "ZeRO-2"), Launch(2, "ZeRO-3"), "was saved with ZeRO-2"),
        (Launch(1, None), Launch(2, "FSDP2"), "was saved with no sharding"),
    ],
)
def test_the_number_of_ranks_may_change_where_the_host_can_read_the_checkpoint(
    saved: Launch, now: Launch, message: str
) -> None:
    checkpoint = Checkpoint(Path("checkpoint-4"), 4, {"ranks": saved.ranks, "sharding": saved.sharding})
    run: Any = SimpleNamespace(launch=now)
    zero = {"stage": int((now.sharding or "ZeRO-0")[-1])}
    cfg: Any = SimpleNamespace(optimizer="adamw_torch", deepspeed={"zero_optimization": zero})
    if message:
        with pytest.raises(ValueError, match=message):
            _check_launch(checkpoint, run, cfg)
    else:
        regrouped = _check_launch(checkpoint, run, cfg)
        assert regrouped == (saved.ranks != now.ranks and now.sharding == "ZeRO-3")


def test_what_a_folder_without_a_mark_is(tmp_path: Path) -> None:
    """A save that was killed at its very start leaves nothing but dotted names; anything more is another trainer's."""
    folder = tmp_path / "checkpoint-3"
    folder.mkdir()
    (folder / ".spin.json.0a1b").touch()
    assert (read_checkpoint(folder).ours, read_checkpoint(folder).finished) == (True, False)
    (folder / "model.safetensors").touch()
    assert (read_checkpoint(folder).ours, read_checkpoint(folder).finished) == (False, True)
    write_json(folder / "spin.json", {"step": 3, "complete": True, "files": {"model.safetensors": 0}, "run": "a"})
    assert (read_checkpoint(folder).step, read_checkpoint(folder).fault) == (3, "")
    (folder / "spin.json").unlink()
    (folder / "spin.json").symlink_to("nowhere")  # nothing that a run has left, and so nothing to remove
    found = read_checkpoint(folder)
    assert (found.finished, found.fault) == (True, "its spin.json is gone")


@pytest.mark.parametrize("moment", ["listed", "about to be read"])
def test_what_rank_0_removes_meanwhile_is_no_other_trainers(
    moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every rank reads the checkpoints of a start, while rank 0 removes what a stopped save has left."""
    folder = tmp_path / "checkpoint-3"
    write_json(folder / "spin.json", {"step": 3, "complete": False, "files": {}})
    (folder / "model.safetensors").touch()
    owner, name = (Path, "iterdir") if moment == "listed" else (checkpoints, "read_json")
    whole: Any = getattr(owner, name)

    def meanwhile(path: Path) -> Any:
        listed = list(whole(path)) if moment == "listed" else None
        remove_folder(folder, tmp_path / "spin")
        return whole(path) if listed is None else iter(listed)

    monkeypatch.setattr(owner, name, meanwhile)
    found = read_checkpoint(folder)
    assert (found.ours, found.finished, folder.exists()) == (True, False, False)
