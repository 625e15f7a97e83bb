"""Hosts outside the tested range are refused, by name, before the config is read."""

from __future__ import annotations

import pytest

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
