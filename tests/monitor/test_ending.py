"""What stands at the end of the output where a run cannot start, as the launchers of both hosts leave it."""

from __future__ import annotations

import json
from pathlib import Path

import host
import pytest
from warm import Warm

import axolotl_spin
from axolotl_spin.monitor.ending import plain_message

PACKAGE = Path(axolotl_spin.__file__).parent
SAID = "axolotl-spin: the config is refused:\nthere is no key `spin.iteration`: did you mean `spin.iterations`?\n"


def raised(source: str, file: Path) -> BaseException:
    try:
        exec(compile(source, str(file), "exec"), {})
    except BaseException as error:
        return error
    raise AssertionError("nothing was raised")


@pytest.mark.once
@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("raise ValueError('change `x`')", "change `x`"),
        ("import errno\nraise OSError(errno.ENOSPC, 'no space for x')", "no space for x"),
        ("try:\n    int('x')\nexcept ValueError as error:\n    raise RuntimeError('no number') from error", "no number"),
        ("int('x')", None),  # a bug of ours, raised by what we called
        ("import json\njson.loads('{')", None),
        ("try:\n    int('x')\nexcept ValueError:\n    raise", None),
        ("{}['x']", None),
        ("assert False, 'a bug of ours'", None),
        ("raise SystemExit(0)", None),
        ("raise KeyboardInterrupt", None),
    ],
)  # fmt: skip
def test_only_what_we_say_ourselves_goes_without_its_traceback(source: str, said: str | None) -> None:
    assert plain_message(raised(source, PACKAGE / "made" / "up.py")) == said
    assert plain_message(raised(source, PACKAGE.parent / "elsewhere.py")) is None


@pytest.mark.once
@pytest.mark.host
def test_a_refusal_is_the_last_that_one_rank_prints(tmp_path: Path) -> None:
    """`--quiet` takes away accelerate's traceback, which nothing within the run can."""
    settings = host.config(tmp_path, spin={"iteration": 2})
    run = host.start(
        settings, "-m", "axolotl.cli.main", "train", "{config}", "--", "--quiet", env={"ACCELERATE_USE_CPU": "true"}
    )
    assert run.code == 1
    assert run.output.endswith(f"\n\n{SAID}\n") and "Traceback" not in run.output, run.output[-3000:]
    assert (
        len(run.output.splitlines()) < 45
    )  # of which the host's banner, accelerate's advice, warnings of other packages


@pytest.mark.host
@pytest.mark.ranks
@pytest.mark.once
def test_torchrun_shows_a_refusal_last_and_once(tmp_path: Path) -> None:
    run = host.train(host.config(tmp_path, spin={"iteration": 2}), "ddp", fails=True)
    assert run.output.count("axolotl-spin: ") == 1
    shown = SAID.replace("\n", "\n  ").rstrip()
    root = run.output[run.output.index("Root Cause") :]
    assert "  rank      : 0 (local_rank: 0)\n" in root and f"  traceback : {shown}\n====" in root
    assert len(root.split("traceback : ")[1].splitlines()) == 3


@pytest.mark.host
def test_the_traceback_of_a_start_that_got_further_is_in_the_debug_log(warm: Warm, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"text": "w1"}) + "\n")
    data = [{"path": str(rows), "ds_type": "json", "type": "chat_template"}]
    run = host.train(host.config(tmp_path, datasets=data), by=warm, fails=True)
    said = run.output[run.output.index("\naxolotl-spin: ") :]
    assert "Messages is null" in said and f"the traceback is in {run.out}/debug.log" in said
    assert "Traceback" not in run.output
    assert "Traceback (most recent call last)" in (run.out / "debug.log").read_text()


@pytest.mark.host
def test_an_error_in_code_keeps_its_traceback(warm: Warm, tmp_path: Path) -> None:
    fault = {"SPIN_KILL": "start/config read", "SPIN_RAISE": "planted"}
    settings = host.config(tmp_path)
    settings["plugins"] = ["faults.FaultPlugin", *host.OURS]
    run = host.train(settings, by=warm, env=fault, fails=True)
    assert "\nRuntimeError: planted\n" in run.output and "Traceback" in run.output
