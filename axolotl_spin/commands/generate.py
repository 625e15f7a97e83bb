"""`axolotl spin generate`: a run that stops, in order and on every rank, once iteration 0's pairs are on disk.

It is the host's own training up to there, so every layout and backend works, and a later `train` goes on from its files.
"""

from __future__ import annotations

import os
from typing import Any

import click

from axolotl_spin.commands.config import load_config
from axolotl_spin.data.pairs import check_pairs
from axolotl_spin.disk.atomic import DamagedFileError, ForeignFileError
from axolotl_spin.run.prepare import SpinRun
from axolotl_spin.run.resume import settle_start
from axolotl_spin.trainer import SpinTrainer


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
    plugin.trainer_class, plugin.settle = PairsOnlyTrainer, _settle_pairs
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


class PairsMade(SystemExit):
    """Ends the command with code 0. No `Exception`: the host and the other ranks would take it for a failure."""

    def __init__(self) -> None:
        super().__init__(0)


class PairsOnlyTrainer(SpinTrainer):
    """Begins iteration 0 and takes no step."""

    def attach(self, run: SpinRun) -> None:
        # the training that goes on from here plays on held-out rows, and evaluates them
        run.heldout = self.eval_dataset = None
        self.args.eval_on_start = False
        super().attach(run)

    def _run_epoch(self, model: Any, epoch: int, train_dataloader: Any, **kwargs: Any) -> None:  # type: ignore[override]
        assert self.loop is not None
        entry = self.loop.run.plan.of_epoch(epoch)
        with self.loop.ranks:
            self.loop.begin(entry, model)
            self.loop.self_play.end(entry)
        raise PairsMade


def _settle_pairs(run: SpinRun, cfg: Any) -> None:
    """In the place of `settle_start`: ends the command where there is nothing to do, or refuses."""
    _leave_if_made(run)
    settle_start(run, cfg)
    _refuse_if_trained(run, cfg)


def _leave_if_made(run: SpinRun) -> None:
    """Ends the command before a model loads where iteration 0's pairs are on disk already.

    Args:
        run: The run, asked for its pairs alone.

    Raises:
        PairsMade: They are there, whole, and this run's.
        ValueError: There is nothing to generate.
    """
    if run.given is not None:
        raise ValueError(
            f"`spin.initial_pairs: {run.given.source}` gives iteration 0 its pairs, so there is nothing to generate: "
            "remove it, or start `axolotl train`"
        )
    try:
        check_pairs(run.directory.pairs(0), run.identity.before(0), run.plan.iterations[0].rows)
    except (FileNotFoundError, DamagedFileError, ForeignFileError):
        return  # made anew, or refused by what checks the folder
    raise PairsMade


def _refuse_if_trained(run: SpinRun, cfg: Any) -> None:
    """Refuses a run that has trained already, whose start model answers no more.

    Args:
        run: The run, asked for its pairs alone.
        cfg: The host's config, after `settle_start`.

    Raises:
        ValueError: It would go on from a checkpoint.
    """
    if cfg.get("resume_from_checkpoint"):
        raise ValueError(
            f"the run in {run.directory.root.parent} has trained already (a start goes on from "
            f"{cfg.resume_from_checkpoint}), and its pairs of iteration 0 are gone: choose another `output_dir`"
        )
