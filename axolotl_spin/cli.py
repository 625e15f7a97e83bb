"""`axolotl spin ...`: look at a run before and after it. `python -m axolotl_spin ...` does the same."""

from __future__ import annotations

import json
from pathlib import Path

import click


@click.group()
def spin() -> None:
    """Self-Play Fine-Tuning: see what a config will do, and what a run did."""


@spin.command()
@click.argument("config", type=click.Path(exists=True, dir_okay=False, path_type=str))
@click.option("--json", "as_json", is_flag=True, help="Print the plan as JSON.")
@click.option("--ranks", type=click.IntRange(min=1), default=1, show_default=True, help="Ranks (GPUs) of the launch.")
def plan(config: str, as_json: bool, ranks: int) -> None:
    """Validate CONFIG, tokenise its data and print the plan. Loads no model weights."""
    from axolotl.cli.config import load_cfg
    from axolotl.integrations.base import PluginManager

    from axolotl_spin.plugin import SpinPlugin
    from axolotl_spin.report import plan_table, print_wide

    cfg = load_cfg(config)
    cfg.world_size = ranks
    plugin = next((p for p in PluginManager.get_instance().plugins.values() if isinstance(p, SpinPlugin)), None)
    if plugin is None or plugin.load_datasets(cfg, preprocess=True) is None:
        raise click.ClickException(f"{config} does not say `rl: spin`")
    assert plugin.run is not None
    if as_json:
        click.echo(json.dumps(plugin.run.plan.to_json(), indent=2))
    else:
        print_wide(plan_table(plugin.run.plan))


@spin.command()
@click.argument("output_dir", type=click.Path(exists=True, file_okay=False, path_type=Path))
def table(output_dir: Path) -> None:
    """Print the table of iterations of the run in OUTPUT_DIR, finished or not."""
    from axolotl_spin.artifacts import DamagedFileError, RunDirectory, read_json
    from axolotl_spin.report import iteration_table, print_wide, read_metrics

    directory = RunDirectory(output_dir)
    if not directory.plan.exists():
        raise click.ClickException(f"{output_dir} holds no SPIN run: there is no {directory.plan}")
    try:
        iterations = len(read_json(directory.plan)["iterations"])
    except (DamagedFileError, KeyError) as error:
        raise click.ClickException(f"{directory.plan} is damaged: {error}") from error
    print_wide(iteration_table(read_metrics(directory.metrics(iteration) for iteration in range(iterations))))


@spin.command()
@click.argument("output_dirs", nargs=-1, required=True, metavar="OUTPUT_DIR...", type=click.Path(path_type=Path))
@click.option(
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Where to write the page. Default: OUTPUT_DIR/spin/report.html; for a comparison, ./spin-comparison.html.",
)
def report(output_dirs: tuple[Path, ...], output: Path | None) -> None:
    """Write a page that shows the run in OUTPUT_DIR, complete or not; of several runs, one that compares them."""
    from axolotl_spin.artifacts import RunDirectory
    from axolotl_spin.reporting import write_report
    from axolotl_spin.reporting.reading import NoRunError

    if output is None:
        output = RunDirectory(output_dirs[0]).report if len(output_dirs) == 1 else Path("spin-comparison.html")
    try:
        size = write_report(output_dirs, output)
    except NoRunError as error:
        raise click.ClickException(str(error)) from error
    except OSError as error:
        raise click.ClickException(
            f"the page could not be written; name another place with --output: {error}"
        ) from error
    click.echo(f"{output} ({size / 1e6:.1f} MB): open it in a browser; it needs no network")
