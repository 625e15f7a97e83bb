"""Where a line belongs: the order of the rooms, what must load neither torch nor the host, and how long a file may be."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import host
import pytest

PACKAGE = Path(__file__).parents[1] / "axolotl_spin"

# a file imports from its own room and from rooms to its left
ORDER = [
    *(
        "uclaml",
        "keys",
        "settings",
        "refusals",
        "launched",
        "set_aside",
        "compat",
        "args",
        "disk",
        "ranks",
        "data",
        "generation",
        "training",
        "run",
        "monitor",
        "evals",
    ),
    *("report", "game", "callbacks", "trainer", "plugin", "commands", "cli"),
]
# the package itself, whose lazy attribute and `python -m` look up
ENTRANCES = ("__init__", "__main__")


def room(module: str) -> str:
    return module.split(".")[1]


def imports_of(source: str) -> set[str]:
    """Returns the modules of this package that a source imports, at any depth of its code."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are written out"
            if node.module == "axolotl_spin":
                found |= {f"axolotl_spin.{name.name}" for name in node.names if name.name != "__version__"}
            elif (node.module or "").startswith("axolotl_spin."):
                found.add(str(node.module))
        elif isinstance(node, ast.Import):
            found |= {name.name for name in node.names if name.name.startswith("axolotl_spin.")}
    return found


def misplaced(name: str, source: str) -> list[str]:
    """Returns the imports of a file that look to the right of its own room."""
    own = ORDER.index(room(name))
    return [f"{name} imports {other}" for other in sorted(imports_of(source)) if ORDER.index(room(other)) > own]


def files() -> dict[str, Path]:
    found = {
        ".".join(["axolotl_spin", *path.relative_to(PACKAGE).with_suffix("").parts]): path
        for path in PACKAGE.rglob("*.py")
    }
    return {name: path for name, path in found.items() if room(name) not in ENTRANCES}


@pytest.mark.once
def test_imports_look_to_the_left() -> None:
    assert {room(name) for name in files()} == set(ORDER)
    wrong = [line for name, path in files().items() for line in misplaced(name, path.read_text())]
    assert not wrong, "\n".join(wrong)


@pytest.mark.once
def test_an_import_to_the_right_is_found_however_it_is_written() -> None:
    right = [
        "from axolotl_spin.game.loop import Loop",
        "def f():\n    from axolotl_spin.game import loop",
        "import axolotl_spin.game.loop",
        "from axolotl_spin import trainer",
    ]
    for source in right:
        assert misplaced("axolotl_spin.data.pairs", source), source
    assert not misplaced("axolotl_spin.data.pairs", "from axolotl_spin.disk.atomic import write_json")
    assert not misplaced("axolotl_spin.data.pairs", "from axolotl_spin.data.answers import identical")


@pytest.mark.once
@pytest.mark.parametrize(
    "code",
    [
        "import axolotl_spin.report.page, axolotl_spin.report",
        "import click.testing; from axolotl_spin.cli import spin\n"
        "assert click.testing.CliRunner().invoke(spin, ['--help']).exit_code == 0\n"
        "for name in spin.commands:\n"
        "    assert click.testing.CliRunner().invoke(spin, [name, '--help']).exit_code == 0",
    ],
    ids=["report", "help"],
)
def test_neither_torch_nor_the_host_is_loaded_for(code: str) -> None:
    heavy = ["torch", "transformers", "axolotl", "datasets", "accelerate", "deepspeed", "trl", "peft"]
    code += f"\nimport json, sys; print(json.dumps([m for m in {heavy} if m in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", code], env=host.environment(), capture_output=True, text=True)
    assert json.loads(done.stdout or "null") == [], done.stderr


@pytest.mark.once
def test_no_file_outgrows_a_reader() -> None:
    lengths = {name: len(path.read_text().splitlines()) for name, path in files().items()}
    assert {name: lines for name, lines in lengths.items() if lines > 300} == {}
