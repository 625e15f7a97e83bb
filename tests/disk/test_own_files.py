"""What lies in `spin/` may have been put there by somebody else: no link is followed, nothing but our own is removed."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import finished
import pytest
from click.testing import CliRunner

from axolotl_spin.cli import spin
from axolotl_spin.disk.atomic import DamagedFileError, path_aside, read_json, remove_folder, remove_leftovers
from axolotl_spin.disk.directory import ForeignFolderError, RunDirectory, check_own, remove_signs, sign_of
from axolotl_spin.disk.lock import hold_directory, kind_of_mount
from axolotl_spin.disk.printable import printable

pytestmark = pytest.mark.once


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    """A folder outside the run, with what nobody wants to lose."""
    made = tmp_path / "victim"
    (made / ".ssh").mkdir(parents=True)
    for name in (".profile", ".ssh/key", "plan.json"):
        (made / name).write_text("precious")
    return made


def content(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in sorted(folder.rglob("*")) if path.is_file()}


# what stands where in the folder of a run, and where it leads; nowhere: a pipe, at which a reader would wait for ever
FOREIGN = {
    "spin itself": ("spin", "."),
    "an iteration": ("spin/iteration-9", "."),
    "the lock": ("spin/run.lock", ".profile"),
    "the log": ("spin/log.jsonl", ".profile"),
    "weights": ("spin/iteration-0/model/model.safetensors", ".ssh/key"),
    "into nothing": ("spin/iteration-0/.opponent", "not there"),
    "a pipe": ("spin/best.json", None),
}


@pytest.mark.parametrize("foreign", FOREIGN)
def test_links_and_pipes_are_refused_by_every_reader(foreign: str, victim: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    finished.make(out)
    directory, before = RunDirectory(out), content(victim)
    check_own(directory)
    place, target = FOREIGN[foreign]
    path = out / place
    path.parent.mkdir(exist_ok=True)
    if path.exists():
        path.rename(out / "away")
    if target is None:
        os.mkfifo(path)
    else:
        path.symlink_to(victim / target)
    with pytest.raises(ForeignFolderError, match="is a link or a special file, which no run makes"):
        check_own(directory)
    for command in (
        ["table"],
        ["report"],
        ["eval", "--tasks", "gsm8k"],
        ["export", "--iteration", "0", "--format", "parquet", "--output", str(tmp_path / "exported")],
    ):
        done = CliRunner().invoke(spin, [command[0], str(out), *command[1:]])
        assert done.exit_code == 1 and "is a link or a special file" in done.output, done.output
    assert content(victim) == before and not (tmp_path / "exported").exists()


def test_an_own_folder_is_taken_however_its_output_dir_is_reached(tmp_path: Path, victim: Path) -> None:
    """The user's own link is no reason, nor what an earlier start has moved out of the way."""
    finished.make(tmp_path / "disk")
    (tmp_path / "disk" / "spin" / "replaced-1").symlink_to(victim)
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    check_own(RunDirectory(tmp_path / "out"))
    check_own(RunDirectory(tmp_path / "not there"))


def test_leftovers_are_those_that_this_package_makes(tmp_path: Path, victim: Path) -> None:
    root = tmp_path / "spin"
    ours = [
        path_aside(root / "plan.json"), path_aside(root / "start" / "evals.json"), path_aside(root / "checkpoint-3"),
        root / ".checkpoint-4" / "config.json",
        *(root / "iteration-0" / name for name in (".pairs.arrow", ".opponent", "..opponent", ".model", ".engine-11")),
        path_aside(root / "iteration-0" / "chunks" / "000001.parquet"),
    ]  # fmt: skip
    others = [root / ".gitignore", root / "iteration-0" / ".nfs0000001", root / "iteration-0" / "chunks" / ".hidden"]
    for path in (*ours, *others):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("half")
    folder = path_aside(root / "iteration-0")
    (folder / "inner").mkdir(parents=True)
    linked = path_aside(root / "iteration-1")
    linked.symlink_to(victim)
    (victim / ".opponent").write_text("precious")
    (root / "iteration-1").symlink_to(victim)
    remove_leftovers(root)
    assert not any(os.path.lexists(path) for path in (*ours, folder, linked))
    assert all(path.exists() for path in others)
    assert sorted(content(victim)) == [".opponent", ".profile", ".ssh/key", "plan.json"]
    (root / "iteration-1").unlink()
    (tmp_path / "other").symlink_to(victim)
    remove_leftovers(tmp_path / "other")
    assert (victim / ".opponent").exists()


def test_signs_of_killed_starts_go_once_no_start_can_be_at_it(tmp_path: Path) -> None:
    """Another rank may be trying the folder at this moment, and another node looking for who sees it."""
    probe, sign = path_aside(tmp_path / "probe"), sign_of(tmp_path, "0123456789abcdef", 8)
    others = [tmp_path / ".probe", tmp_path / ".spin-8", tmp_path / "probe.0123abcd"]
    (probe / "aside").mkdir(parents=True)
    for path in (sign, *others):
        path.touch()
    remove_signs(tmp_path)
    assert probe.exists() and sign.exists()
    for path in (probe, sign, *others):
        os.utime(path, (0, 0))
    remove_signs(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted(others)


def test_a_linked_checkpoint_is_let_go_and_not_what_it_stands_for(tmp_path: Path, victim: Path) -> None:
    checkpoint = tmp_path / "checkpoint-3"
    checkpoint.symlink_to(victim)
    before = content(victim)
    remove_folder(checkpoint, tmp_path / "spin")
    assert not os.path.lexists(checkpoint) and list((tmp_path / "spin").iterdir()) == [] and content(victim) == before


def test_the_lock_is_not_written_through_a_link(tmp_path: Path, victim: Path) -> None:
    directory = RunDirectory(tmp_path / "out")
    directory.root.mkdir(parents=True)
    directory.lock.symlink_to(victim / ".profile")
    with pytest.raises(OSError, match="Too many levels"):
        hold_directory(directory)
    assert (victim / ".profile").read_text() == "precious"


def test_the_kind_of_a_mount_is_told_by_its_device(tmp_path: Path) -> None:
    """On FUSE an open file's lock may outlast its process."""
    mounts = (
        "27 1 254:0 / / rw,relatime - ext4 /dev/vda rw\n"
        "90 27 0:51 / /mnt/my\\040bucket rw,nosuid shared:7 master:1 - fuse.juicefs JuiceFS:a rw,user_id=0\n"
    )
    found = [kind_of_mount(os.makedev(*numbers), mounts) for numbers in ((254, 0), (0, 51), (0, 5))]
    assert found == ["ext4", "fuse.juicefs", ""]
    if sys.platform == "linux":
        here = Path("/proc/self/mountinfo").read_text()
        assert kind_of_mount(os.stat("/proc").st_dev, here) == "proc"


@pytest.mark.parametrize("text", ["[" * 200_000, '{"step": ' + "9" * 5000 + "}", "\x80", '{"a": \ud800}', "[]", "null"])
def test_json_that_no_reader_should_trip_over_is_damaged(text: str, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(DamagedFileError, match="is damaged"):
        read_json(path)


def test_what_a_terminal_acts_on_is_written_out() -> None:
    assert printable("plain, naïve 中文 \U0001f600\ta\nb") == "plain, naïve 中文 \U0001f600\ta\nb"
    assert printable("\x1b]0;owned\x07\x1b[2J") == "\\x1b]0;owned\\x07\\x1b[2J"
    assert printable("\x9b31m\rover\x08\u2028\u202egnp.exe\ud800\x00\x7f") == (
        "\\x9b31m\\rover\\x08\\u2028\\u202egnp.exe\\ud800\\x00\\x7f"
    )
    assert str(DamagedFileError("\x1b[2J")) == "\\x1b[2J"


@pytest.mark.parametrize(
    "change",
    [
        {"iteration": "../../victim"}, {"iteration": 1}, {"iteration": 0.0}, {"iteration": True}, {"rows": "40"},
        {"steps": -1}, {"steps": 1e300}, {"beta": "\x1b[2J"}, {"learning_rate": float("nan")}, {"unknown": 1},
    ],
    ids=str,
)  # fmt: skip
def test_a_plan_whose_iterations_are_no_numbers_in_order_is_refused(change: dict, tmp_path: Path) -> None:
    """Paths are made of them."""
    finished.make(tmp_path)
    path = RunDirectory(tmp_path).plan
    plan = json.loads(path.read_text())
    plan["iterations"][0] |= change
    path.write_text(json.dumps(plan))
    done = CliRunner().invoke(spin, ["table", str(tmp_path)])
    assert done.exit_code == 1 and "plan.json is damaged: iteration 0" in done.output, done.output
    assert "\x1b" not in done.output


HOSTILE = "\x1b]0;owned\x07[bold red]\x1b[2J[/nothing] :bomb: \r"


def test_the_table_shows_hostile_texts_as_text(tmp_path: Path) -> None:
    """Escape sequences, rich's markup and figures that are none, wherever a folder's files have texts."""
    out = tmp_path / "[/runs]"
    finished.make(out)
    directory = RunDirectory(out)
    best = {"best": HOSTILE, "says": [HOSTILE, f"second {HOSTILE}"]}
    directory.best.write_text(json.dumps(best))
    metrics = json.loads(directory.metrics(0).read_text())
    metrics |= {"spin/iteration": HOSTILE, "loss_first": HOSTILE, "rewards/margins": [1], f"spin/eval/{HOSTILE}/acc": 0.5,
                "spin/eval/task/acc": HOSTILE, "spin/eval/task/acc_stderr": HOSTILE}  # fmt: skip
    directory.metrics(0).write_text(json.dumps(metrics))
    about = {"ended": {"step": 3, "why": HOSTILE}}
    directory.about.write_text(json.dumps(about))
    done = CliRunner().invoke(spin, ["table", str(out)], catch_exceptions=False)
    assert done.exit_code == 0
    assert not set(done.stdout) & set("\x1b\x07\r")
    shown = "\\x1b]0;owned\\x07[bold red]\\x1b[2J[/nothing] :bomb: \\r"
    assert f"second {shown}" in done.stdout and f"since {shown}" in done.stdout and shown[:14] in done.stdout
    damaged = json.dumps({"iterations": {HOSTILE: 1}})
    directory.plan.write_text(damaged)
    done = CliRunner().invoke(spin, ["table", str(out)])
    assert done.exit_code == 1 and "plan.json is damaged" in done.output and "\x1b" not in done.output
