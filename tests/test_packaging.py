"""The built wheel, in an environment of its own beside the host."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import host
import pytest

pytestmark = pytest.mark.once


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment into which only our wheel is installed; the host's packages come from this one."""
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", folder, host.ROOT],
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
        "names = ('py.typed', 'report/page.html', 'report/page.css', 'report/page.js');"
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


def test_pip_show_names_python_and_host_versions(python: Path) -> None:
    shown = run(python, "-m", "pip", "show", "-v", "axolotl-spin")
    summary = next(line for line in shown.splitlines() if line.startswith("Summary: "))
    for named in ("0.19 (Python 3.11)", "0.20 and 0.21 (Python 3.12)"):
        assert named in summary
    for version in ("3.11", "3.12"):
        assert f"  Programming Language :: Python :: {version}\n" in shown
    code = (
        "import importlib.metadata as m; found = m.metadata('axolotl-spin');"
        "print(found['Requires-Python'], found['Description-Content-Type'], found['License-Expression'])"
    )
    assert run(python, "-c", code).split() == [">=3.11", "text/markdown", "Apache-2.0"]
