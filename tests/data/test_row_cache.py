"""Converted rows are taken from the cache only where the same code made them from the same rows and settings."""

from __future__ import annotations

import importlib.util
import multiprocessing
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from datasets import Dataset, Features, Value, load_from_disk

from axolotl_spin.data.row_cache import map_rows

FEATURES = Features({"made": Value("int64")})


def module(path: Path, text: str) -> ModuleType:
    path.write_text(text)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    return importlib.util.module_from_spec(spec)


@pytest.fixture
def rows(tmp_path: Path) -> Any:
    Dataset.from_dict({"number": [1, 2, 3]}).save_to_disk(tmp_path / "rows")
    return load_from_disk(tmp_path / "rows")


def made(rows: Any, code: ModuleType, setting: int, calls: list[int]) -> list[int]:
    def convert(batch: dict[str, list], indices: list[int]) -> dict[str, list]:
        calls.append(len(indices))
        return {"made": [setting * number for number in batch["number"]]}

    found = map_rows(rows, convert, code=[code], settings=[setting], features=FEATURES, desc="converting")
    return list(found["made"])


def test_other_code_or_settings_convert_anew(rows: Any, tmp_path: Path) -> None:
    code, calls = module(tmp_path / "code.py", "first"), []
    assert made(rows, code, 2, calls) == made(rows, code, 2, calls) == [2, 4, 6] and calls == [3]
    assert made(rows, code, 5, calls) == [5, 10, 15] and calls == [3, 3]
    made(rows, module(tmp_path / "code.py", "second"), 5, calls)
    assert calls == [3, 3, 3]


def slowly(folder: Path, code: Path) -> None:
    def convert(batch: dict[str, list], indices: list[int]) -> dict[str, list]:
        with open(folder / "calls", "a") as file:
            file.write("a call\n")
        time.sleep(0.5)
        return {"made": batch["number"]}

    rows = load_from_disk(folder / "rows")
    map_rows(rows, convert, code=[module(code, "same")], settings=[], features=FEATURES, desc="converting")


def test_of_several_processes_one_converts(rows: Any, tmp_path: Path) -> None:
    both = [
        multiprocessing.get_context("fork").Process(target=slowly, args=(tmp_path, tmp_path / f"code{number}.py"))
        for number in range(2)
    ]
    for process in both:
        process.start()
    for process in both:
        process.join(60)
    assert [process.exitcode for process in both] == [0, 0]
    assert (tmp_path / "calls").read_text() == "a call\n"
