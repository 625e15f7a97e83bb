"""A YAML as the host's commands load it, and this package's plugin in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import yaml
from axolotl.cli.config import load_cfg
from axolotl.integrations.base import PluginManager

from axolotl_spin.args import is_on
from axolotl_spin.monitor.ending import plain_message
from axolotl_spin.plugin import SpinPlugin


def load_config(path: str) -> tuple[Any, SpinPlugin]:
    """Loads and validates a config.

    Args:
        path: The YAML.

    Returns:
        The host's normalized config, and the plugin that the host has registered for it.

    Raises:
        click.ClickException: It is not valid, or does not say `rl: spin`.
    """
    try:
        cfg = load_cfg(path)
    except ValueError as error:
        raise click.ClickException(f"{path}: {_why(path, error)}") from error
    plugin = next((p for p in PluginManager.get_instance().plugins.values() if isinstance(p, SpinPlugin)), None)
    if plugin is None or not is_on(cfg):
        raise click.ClickException(f"{path} does not say `rl: spin`")
    return cfg, plugin


def _why(path: str, error: ValueError) -> str:
    """Returns what is wrong with a config; where the host knows no `rl: spin`, that it has not loaded the plugin."""
    loaded = any(isinstance(plugin, SpinPlugin) for plugin in PluginManager.get_instance().plugins.values())
    if not loaded and yaml.safe_load(Path(path).read_text(encoding="utf-8")).get("rl") == "spin":
        return "the host has not loaded the plugin: add `plugins: [axolotl_spin.SpinPlugin]`"
    return plain_message(error) or str(error)
