"""`make test-gpu` where there is no GPU: every piece that a CPU can do is done, and every line of it is executed.

Lines that only a GPU can run say so at their end, and why; those that take two ranks likewise, and are run where those are.
"""

from __future__ import annotations

import ast
import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import host
import pytest
from warm import Ranks, Warm

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

pytestmark = [pytest.mark.host, pytest.mark.once]

FILES = {str(Path(__file__).with_name(f"{name}.py")) for name in ("machine", "pieces", "command")}
EXECUTED: dict[str, set[int]] = {name: set() for name in FILES}
PLAYED: set[str] = set()
_MARKS = {name: re.compile(rf"# {name}: \w+") for name in ("GPU only", "two ranks")}


@contextmanager
def traced() -> Iterator[None]:
    """Notes the lines of `FILES` that are executed."""

    def local(frame: FrameType, event: str, _: Any) -> Any:
        if event == "line":
            EXECUTED[frame.f_code.co_filename].add(frame.f_lineno)
        return local

    before = sys.gettrace()
    sys.settrace(lambda frame, event, _: local if frame.f_code.co_filename in FILES else None)
    try:
        yield
    finally:
        sys.settrace(before)


with traced():  # what makes the pieces is executed here
    import command
    from machine import Machine
    from pieces import PIECES, Piece


def lines_of(path: str) -> dict[str, set[int]]:
    """Returns the first lines of statements within functions by what they need: "" for a CPU, or one of the marks."""
    text = Path(path).read_text()
    marked = {
        name: {number for number, line in enumerate(text.splitlines(), 1) if mark.search(line)}
        for name, mark in _MARKS.items()
    }
    found: dict[str, set[int]] = {"": set(), **{name: set() for name in _MARKS}}
    used: set[int] = set()

    def note(node: ast.stmt, need: str) -> None:
        """Notes a statement within a function, and what is in it; a mark on a function's first line holds for all of it."""
        compound = hasattr(node, "body")
        span = {node.lineno} if compound else set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
        for name, lines in marked.items():
            if span & lines:
                need = name
                used.update(span & lines)
        docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if not docstring and not isinstance(node, (ast.FunctionDef, ast.Try, ast.With)):
            found[need].add(node.lineno)
        inner = [part for name in ("body", "orelse", "finalbody") for part in getattr(node, name, [])]
        for part in [*inner, *(part for handler in getattr(node, "handlers", []) for part in handler.body)]:
            note(part, need)

    def look(nodes: list[ast.stmt]) -> None:
        for node in nodes:
            if isinstance(node, ast.FunctionDef):
                note(node, "")
            elif isinstance(node, ast.ClassDef):
                look(node.body)

    look(ast.parse(text).body)
    assert used == set().union(*marked.values()), f"{path}: a mark stands where no statement is"
    return found


@pytest.fixture(scope="module")
def machine(warm: Warm) -> Machine:
    return Machine(0, forks=(warm, None))


@pytest.fixture(scope="module", autouse=True)
def search() -> Iterator[None]:
    """Runs find the plugins of benchmarks and pieces; the newest TRL's environment is none of this test's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", ":".join([*command.SEARCH, *sys.path[:1]]))
        patch.delenv("SPIN_VLLM_PYTHON", raising=False)
        yield


def play(piece: Piece, machine: Machine, folder: Path) -> dict[str, Any]:
    with traced():
        row = command.played(piece, folder, machine)
    PLAYED.add(piece.name)
    assert json.loads(json.dumps(row)) == row and row["figures"]
    return row


SEVERAL = [piece for piece in PIECES if piece.several]
ALONE = [piece for piece in PIECES if not piece.several and not piece.lacks(Machine(0))]


@pytest.mark.parametrize("piece", ALONE, ids=lambda piece: piece.name)
def test_a_piece(piece: Piece, machine: Machine, tmp_path: Path) -> None:
    assert play(piece, machine, tmp_path)["machine"]["gpus"] == []


@pytest.mark.ranks
@pytest.mark.parametrize("piece", SEVERAL, ids=lambda piece: piece.name)
def test_a_piece_on_two_ranks(piece: Piece, warm: Warm, warm_ranks: Ranks, tmp_path: Path) -> None:
    play(piece, Machine(0, forks=(warm, warm_ranks)), tmp_path)


def test_what_only_a_gpu_can_do_says_what_is_missing() -> None:
    """With one GPU, with two, and without."""
    with traced():
        none, one, two = ({piece.name for piece in PIECES if piece.lacks(Machine(count))} for count in range(3))
    several, names = {piece.name for piece in SEVERAL}, {piece.name for piece in PIECES}
    assert none == names - several - {piece.name for piece in ALONE}
    assert several <= one and not several & two


def test_the_command_keeps_what_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Pieces in processes of their own: one ends well, one is left out, one has no end; each is in the file."""
    fine = next(piece for piece in PIECES if piece.name == "layouts")
    missing = Piece("missing", lambda *_: {}, lambda _: "there is no GPU")
    asked = ["--folder", str(tmp_path / "runs"), "--json", str(tmp_path / "gpu.json")]
    monkeypatch.setattr(command, "PIECES", [fine, missing])
    with traced():
        assert command.main([*asked, "--results", str(tmp_path / "GPU.md")]) == 0
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert [row["status"] for row in report["pieces"]] == ["passed", "skipped"]
    printed = capsys.readouterr().out
    assert "passed   layouts" in printed and "skipped  missing: there is no GPU" in printed
    assert not (tmp_path / "GPU.md").exists(), "a page without a GPU"
    monkeypatch.setattr(command, "LIMIT", 0.5)
    monkeypatch.setattr(command, "PIECES", [fine._replace(name="endless"), missing])
    with traced():
        assert command.main(asked) == 1
    failed = json.loads((tmp_path / "gpu.json").read_text())["pieces"]
    assert [row["status"] for row in failed] == ["failed", "skipped"] and "no end after 0.5 s" in failed[0]["error"][-1]
    with traced():
        page = command.page({**report, "pieces": report["pieces"] + failed})
    assert "no GPU: the figures say nothing" in page and "| sdpa, shared, bfloat16 |" in page
    assert "| endless | failed |" in page and "no end after 0.5 s" in page


def test_the_command_of_a_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "PIECES", [Piece("a", lambda machine, folder: {"figure": 1.5})])
    with traced():
        assert command.main(["--one", "a", "--folder", str(tmp_path), "--json", str(tmp_path / "one.json")]) == 0
        assert command.main(["--json", str(tmp_path / "none.json"), "--pieces", "nothing"]) == 0
        found = {"name": "a", "status": "passed", "figures": {"figure": 1.5, "files": ["x", "y"]}}
        assert "| figure | 1.5 |\n| files | x, y |" in command.section(found)
    assert json.loads((tmp_path / "one.json").read_text())["figures"] == {"figure": 1.5}


def test_a_launch_takes_its_device_from_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One process one GPU, and as many processes as GPUs; the host's command in each."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    assert Machine(2).environment() == {"CUDA_VISIBLE_DEVICES": "3"} and Machine(2).environment("ddp") == {}
    assert Machine(0).environment() == {"ACCELERATE_USE_CPU": "true"}
    launched: list[tuple[str, ...]] = []

    def start(settings: dict[str, Any], *command: str, **_: Any) -> host.Run:
        launched.append(command)
        return host.Run(0, 'banner\n{\n "memory": 1}\n', tmp_path)

    monkeypatch.setattr(host, "start", start)
    with traced():
        Machine(2).train({}, "zero3")
        Machine(1).train({})
        assert Machine(1).plan({}) == {"memory": 1}
    assert "torch.distributed.run" in launched[0] and "2" in launched[0]
    assert launched[1] == ("-m", "axolotl.cli.train", "{config}")


def left(path: str, need: str) -> list[str]:
    """Returns the lines of a file that have not been executed."""
    text = Path(path).read_text().splitlines()
    return [f"{number}: {text[number - 1]}" for number in sorted(lines_of(path)[need] - EXECUTED[path])]


@pytest.mark.parametrize("path", sorted(FILES), ids=lambda path: Path(path).name)
def test_every_line_has_been_executed(path: str) -> None:
    if not {piece.name for piece in ALONE} <= PLAYED:
        pytest.skip("the pieces have not all been played")
    assert left(path, "") == []
    stale = lines_of(path)["GPU only"] & EXECUTED[path]
    assert not stale, f"a CPU executes lines that are marked as a GPU's: {stale}"


@pytest.mark.ranks
@pytest.mark.parametrize("path", sorted(FILES), ids=lambda path: Path(path).name)
def test_every_line_of_several_ranks_has_been_executed(path: str) -> None:
    if not {piece.name for piece in SEVERAL} <= PLAYED:
        pytest.skip("the pieces have not all been played")
    assert left(path, "two ranks") == []
