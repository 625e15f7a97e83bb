"""A YAML as the host's commands load it, and this package's plugin in it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import click
import yaml
from axolotl.cli.config import load_cfg
from axolotl.integrations.base import PluginManager
from axolotl.utils.dict import DictDefault
from axolotl.utils.tee import close_debug_log, prepare_debug_log

from axolotl_spin.args import is_on
from axolotl_spin.monitor.ending import plain_message
from axolotl_spin.plugin import SpinPlugin


def load_config(path: str, *, logged: bool = True) -> tuple[Any, SpinPlugin]:
    """Loads and validates a config.

    Args:
        path: The YAML.
        logged: Whether the host begins `OUTPUT_DIR/debug.log` anew, as a start does. A command that only looks must not,
            since the log is that of the folder's run, which may be going on.

    Returns:
        The host's normalized config, and the plugin that the host has registered for it.

    Raises:
        click.ClickException: It is not valid, or does not say `rl: spin`.
    """
    log: AbstractContextManager[None] = nullcontext() if logged else _log_elsewhere()
    try:
        with log:
            cfg = load_cfg(path)
    except ValueError as error:
        raise click.ClickException(f"{path}: {_why(path, error)}") from error
    plugin = next((p for p in PluginManager.get_instance().plugins.values() if isinstance(p, SpinPlugin)), None)
    if plugin is None or not is_on(cfg):
        raise click.ClickException(f"{path} does not say `rl: spin`")
    return cfg, plugin


@contextmanager
def _log_elsewhere() -> Iterator[None]:
    """Has the host log into a folder that goes away: where a log is open it begins no other."""
    name = "AXOLOTL_TEE_STDOUT"
    with tempfile.TemporaryDirectory() as folder:
        kept, os.environ[name] = os.environ.get(name), "0"
        try:
            # without what copies standard output into it: closing a log with that waits for itself (hosts 0.19 to 0.21)
            log = Path(prepare_debug_log(DictDefault(output_dir=folder)))
        finally:
            os.environ.pop(name)
            if kept is not None:
                os.environ[name] = kept
        try:
            yield
        finally:
            if log.parent == Path(folder):  # else it was open before
                close_debug_log()


def _why(path: str, error: ValueError) -> str:
    """Returns what is wrong with a config; where the host knows no `rl: spin`, that it has not loaded the plugin."""
    loaded = any(isinstance(plugin, SpinPlugin) for plugin in PluginManager.get_instance().plugins.values())
    if not loaded and yaml.safe_load(Path(path).read_text(encoding="utf-8")).get("rl") == "spin":
        return "the host has not loaded the plugin: add `plugins: [axolotl_spin.SpinPlugin]`"
    return plain_message(error) or str(error)
