"""Standard output holds a command's result and nothing else, at the depth at which loggers and child processes write."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import finished
import host
import pytest

pytestmark = pytest.mark.once

NOISE = """
import logging, os, subprocess, sys
early = logging.StreamHandler(sys.stdout)  # as the host's, made before the command
from axolotl_spin.commands.output import prints_result
@prints_result
def command(result):
    print("printed")
    early.emit(logging.LogRecord("host", 20, "", 0, "logged", (), None))
    os.write(1, b"below\\n")
    subprocess.run(["echo", "child"])
    print("the result", file=result)
    if sys.argv[1:]:
        raise SystemExit(3)
command()
print("after")
"""


@pytest.mark.parametrize("fails", [False, True])
def test_all_else_goes_to_standard_error(fails: bool) -> None:
    done = subprocess.run(
        [sys.executable, "-c", NOISE, *["x"] * fails], env=host.environment(), capture_output=True, text=True
    )
    assert done.returncode == 3 * fails
    assert done.stdout == ("the result\n" if fails else "the result\nafter\n")
    assert sorted(done.stderr.split()) == ["below", "child", "logged", "printed"]


@pytest.mark.host
@pytest.mark.parametrize("command", ["table", "export", "report"])
def test_the_other_commands_print_their_result_alone(command: str, tmp_path: Path) -> None:
    finished.make(tmp_path)
    more = (
        ["--iteration", "0", "--format", "parquet", "--output", str(tmp_path / "pairs")] if command == "export" else []
    )
    done = subprocess.run(
        [sys.executable, "-m", "axolotl_spin", command, str(tmp_path), *more],
        env=host.environment(), capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    first = {
        "table": "Self-play iterations",
        "export": f"{tmp_path}/pairs: ",
        "report": f"{tmp_path}/spin/report.html (",
    }
    assert done.stdout.strip().startswith(first[command]), done.stdout
