"""The built wheel, in an environment of its own beside the host; and the direction of imports inside the package."""

from __future__ import annotations

import ast
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import host
import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "axolotl_spin"


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment into which only our wheel is installed; the host's packages come from this one."""
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", folder, ROOT],
        check=True,
        env=host.environment(),
    )
    [wheel] = folder.glob("axolotl_spin-*.whl")
    venv.create(folder / "env", with_pip=True)
    made = folder / "env" / "bin" / "python"
    run(made, "-m", "pip", "install", "-q", "--no-deps", str(wheel))
    [site] = (folder / "env" / "lib").glob("python*/site-packages")
    (site / "host.pth").write_text(sysconfig.get_paths()["purelib"])
    return made


def run(python: Path, *arguments: str) -> str:
    env = {key: value for key, value in host.environment().items() if key != "PYTHONPATH"}
    return subprocess.run([python, *arguments], check=True, capture_output=True, text=True, env=env, cwd="/").stdout


def test_the_wheel_holds_everything_and_registers(python: Path) -> None:
    code = (
        "import axolotl_spin, axolotl_spin.uclaml, axolotl_spin.trainer, importlib.metadata as m, pathlib;"
        "print(axolotl_spin.__file__); print(axolotl_spin.__version__);"
        "folder = pathlib.Path(axolotl_spin.__file__).parent;"
        "names = ('py.typed', 'reporting/page.html', 'reporting/page.css', 'reporting/page.js');"
        "print('missing:', *(name for name in names if not (folder / name).exists()));"
        "[print(p.group, p.name, p.value) for g in ('axolotl.plugins', 'axolotl.cli_commands')"
        " for p in m.entry_points(group=g) if p.name == 'spin']"
    )
    lines = run(python, "-c", code).splitlines()
    assert str(python.parents[1]) in lines[0]
    assert lines[1:3] == ["0.1.0", "missing:"]
    assert {"axolotl.plugins spin axolotl_spin:SpinPlugin", "axolotl.cli_commands spin axolotl_spin.cli:spin"} == set(
        lines[3:]
    )


def test_the_commands_work_from_the_wheel(python: Path) -> None:
    assert "plan" in run(python, "-m", "axolotl_spin", "--help")
    assert "Self-Play" in run(python, "-m", "axolotl.cli.main", "spin", "--help")


def imports_of(path: Path) -> set[str]:
    """Returns the modules of this package that a file imports, at any depth of its code."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("axolotl_spin."):
            found.add(node.module.removeprefix("axolotl_spin."))
    return found


# what a file may know of the others: leaves know nothing, host-facing files know the leaves
LAYERS = [
    {
        "artifacts",
        "plan",
        "loss",
        "layouts",
        "prompts",
        "refusals",
        "generation",
        "compat",
        "messages",
        "lengths",
        "memory",
        "peers",
        "sharding",
        "generation.vllm_worker",
        "trackers",
    },
    {"generation.engine", "offload", "tally"},
    {"generation.preflight"},
    {"args", "pairs", "schedule", "generation.decoding", "uclaml", "metrics", "policy", "formats"}
    | {"checkpoints", "chunks", "lock", "logprobs", "about", "steplog"},
    {"advice", "identity", "scoring", "generation.transformers", "generation.serving", "health", "batches", "staging"}
    | {"heldout"},
    {"generation.vllm", "given_pairs"},
    {"conversations", "export"},
    {"run"},
    {"report", "resume", "layout_choice", "callbacks"},
    {"iteration", "progress", "generation.choice", "timing", "plan_view", "play", "terminal"},
    {"trainer"},
    {"only_pairs"},
    # the page of a run knows nothing of training
    {"reporting.reading"},
    {"reporting.answers"},
    {"reporting.figures"},
    {"reporting.charts", "reporting.guide"},
    {"reporting.summaries"},
    {"reporting.page"},
    {"reporting"},
    {"plugin"},
    {"configs"},
    {"generating", "planning"},
    {"cli"},
    {"__main__", "__init__"},
]


def test_imports_go_one_way() -> None:
    level = {name: index for index, names in enumerate(LAYERS) for name in names}
    files = {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
        for path in PACKAGE.rglob("*.py")
    }
    assert set(files) == set(level)
    for name, path in files.items():
        for imported in imports_of(path):
            # the package's own lazy attribute looks up; everything else looks down
            assert level[imported] < level[name], f"{name} imports {imported}"


def test_no_file_outgrows_a_reader() -> None:
    long = {path.name: len(path.read_text().splitlines()) for path in PACKAGE.rglob("*.py")}
    assert max(long.values()) < 340, long
