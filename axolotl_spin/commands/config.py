"""A YAML as the host's commands load it, and this package's plugin in it."""

from __future__ import annotations

from typing import Any

import click
from axolotl.cli.config import load_cfg
from axolotl.integrations.base import PluginManager

from axolotl_spin.args import is_on
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
        raise click.ClickException(f"{path}: {error}") from error
    plugin = next((p for p in PluginManager.get_instance().plugins.values() if isinstance(p, SpinPlugin)), None)
    if plugin is None or not is_on(cfg):
        raise click.ClickException(f"{path} does not say `rl: spin`")
    return cfg, plugin
