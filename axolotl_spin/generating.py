"""The command `axolotl spin generate`."""

from __future__ import annotations

import os

import click

from axolotl_spin.configs import load_config
from axolotl_spin.only_pairs import PairsMade


def generate_pairs(config: str) -> None:
    """Generates and scores iteration 0's pairs, and says where they are; every rank of the launch calls it.

    Args:
        config: The YAML.

    Raises:
        click.ClickException: The config is not valid, or leaves nothing to generate.
    """
    from axolotl.cli.args import TrainerCliArgs
    from axolotl.cli.train import do_train
    from axolotl.utils.distributed import cleanup_distributed

    cfg, plugin = load_config(config)
    if cfg.use_ray:
        raise click.ClickException(
            "`use_ray: true` does not work with `axolotl spin generate`: use `accelerate launch`"
        )
    plugin.pairs_only = True
    try:
        do_train(cfg, TrainerCliArgs())
    except PairsMade:
        cleanup_distributed()
    assert plugin.run is not None
    if int(os.environ.get("RANK", "0")) == 0:
        run, output_dir = plugin.run, plugin.run.directory.root.parent
        click.echo(f"the {run.plan.iterations[0].rows} pairs of iteration 0: {run.directory.pairs(0)}")
        click.echo(f"train on them: axolotl train {config}")
        click.echo(
            f"train on them elsewhere: axolotl spin export {output_dir} --iteration 0 --format uclaml --output pairs "
            "(or dpo, dpo-text, parquet)"
        )
