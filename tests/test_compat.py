"""Hosts outside the tested range are refused by name; where the host fails on preferences, that is said."""

from __future__ import annotations

from pathlib import Path

import pytest
from axolotl.utils.dict import DictDefault
from datasets import Dataset

from axolotl_spin import compat
from axolotl_spin.plugin import SpinPlugin


@pytest.mark.parametrize("found", ["0.18.0", "0.22.0", "1.0"])
def test_untested_hosts_are_refused(found: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "version", lambda name: found)
    with pytest.raises(RuntimeError, match=rf"axolotl {found} is installed.*>=0.19,<0.22"):
        SpinPlugin().register({"rl": "spin"})
    SpinPlugin().register({"rl": "dpo"})


@pytest.mark.parametrize("found", ["0.19.0", "0.20.3", "0.21.0.dev1", "0.21.9"])
def test_tested_hosts_pass(found: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "version", lambda name: found)
    compat.check_host_version()


def test_preferences_in_a_folder_of_splits_are_told(tmp_path: Path) -> None:
    """Such a dataset comes as one for each split where the entry names none; it may have no `train`."""
    for name, split in (("a", "test"), ("b", "train")):
        Dataset.from_dict({"chosen": ["x"], "rejected": ["y"]}).to_parquet(tmp_path / name / f"{split}.parquet")
    told = compat._preferences(DictDefault(datasets=[{"path": str(tmp_path / name)} for name in ("a", "b")]))
    assert f"(`{tmp_path / 'b'}` has the columns `chosen` and `rejected`" in told
