"""`axolotl spin ...`: look at a run before and after it. `python -m axolotl_spin ...` does the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TextIO

import click

from axolotl_spin.commands.output import prints_result
from axolotl_spin.disk.printable import printable
from axolotl_spin.monitor.ending import end_plainly

_RATE = click.FloatRange(min=0, min_open=True)


@click.group()
def spin() -> None:
    """Self-Play Fine-Tuning: see what a config will do, and what a run did."""
    end_plainly()


@spin.command()
@click.argument("config", type=click.Path(exists=True, dir_okay=False, path_type=str))
@click.option(
    "--json",
    "as_json",
    is_flag=True,
    help="Print the plan as JSON, after Axolotl's banner; `python -m axolotl_spin plan` prints it alone.",
)
@click.option("--ranks", type=click.IntRange(min=1), default=1, show_default=True, help="Ranks (GPUs) of the launch.")
@click.option("--generation-tokens-per-second", "generation", type=_RATE, help="Tokens drawn, over all ranks.")
@click.option(
    "--scoring-tokens-per-second", "scoring", type=_RATE, help="Tokens of pairs, forward only, over all ranks."
)
@click.option("--training-tokens-per-second", "training", type=_RATE, help="Tokens of pairs, over all ranks.")
@prints_result
def plan(config: str, as_json: bool, result: TextIO, **given: Any) -> None:
    """Validate CONFIG, tokenise its data, and tell what the run will do and need. Loads no model weights.

    Times follow from given tokens per second, or from what a run in the same output_dir has measured.
    """
    from axolotl_spin.commands.plan.estimate import Given, plan_run
    from axolotl_spin.commands.plan.show import plan_lines
    from axolotl_spin.monitor.tables import print_wide

    run, figures = plan_run(config, Given(**given))
    if as_json:
        if click.get_current_context().find_root().command is not spin:
            click.echo(
                f"Axolotl's banner stands before the JSON; without: python -m axolotl_spin plan {config} --json",
                err=True,
            )
        click.echo(json.dumps(figures, indent=2), file=result)
    else:
        print_wide(*plan_lines(run.plan, figures), file=result)


@spin.command()
@click.argument("config", type=click.Path(exists=True, dir_okay=False, path_type=str))
def generate(config: str) -> None:
    """Only answer the prompts of CONFIG with its model and score the pairs, as iteration 0 would; then stop.

    Start it again after an interruption and it goes on. On several GPUs: accelerate launch -m axolotl_spin generate CONFIG.
    """
    from axolotl_spin.commands.generate import generate_pairs

    generate_pairs(config)


@spin.command()
@click.argument("output_dir", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--iteration", type=click.IntRange(min=0), required=True, help="Whose pairs, counted from 0.")
@click.option(
    "--format", "kind", type=click.Choice(["uclaml", "dpo", "dpo-text", "parquet"]), required=True,
    help="The SPIN authors' messages, TRL's conversational or standard DPO columns, or the token ids as they are.",
)  # fmt: skip
@click.option("--output", type=click.Path(path_type=Path), required=True, help="The folder to make.")
@click.option(
    "--inexact", type=click.Choice(["refuse", "drop", "keep"]), default="refuse", show_default=True,
    help="What to do with pairs that a format of messages or text cannot keep token for token.",
)  # fmt: skip
@click.option("--only-new", is_flag=True, help="Leave out the pairs kept from earlier iterations.")
@click.option(
    "--test-rows", type=click.IntRange(min=0), default=0, help="So many pairs at the end become the split `test`."
)
@click.option("--tokenizer", default="", help="Name or path of the run's tokenizer. Default: the one in OUTPUT_DIR.")
@click.option("--trust-remote-code", is_flag=True, help="Let code run that the tokenizer brings along.")
@click.option(
    "--config", type=click.Path(exists=True, dir_okay=False, path_type=str),
    help="The run's YAML. With pictures, these are read again from its data.",
)  # fmt: skip
@prints_result
def export(result: TextIO, **options: Any) -> None:
    """Write the pairs of one iteration of the run in OUTPUT_DIR, going on, stopped or finished, as a dataset."""
    from axolotl_spin.commands.export.export import Export, describe, export_pairs

    asked = Export(**options)
    for line in describe(asked, export_pairs(asked)):
        click.echo(printable(line), file=result)


@spin.command()
@click.argument("output_dir", type=click.Path(exists=True, file_okay=False, path_type=Path))
@prints_result
def table(output_dir: Path, result: TextIO) -> None:
    """Print the table of iterations of the run in OUTPUT_DIR, finished or not, and where it stands."""
    from axolotl_spin.monitor.tables import best_lines, iteration_table, print_wide, read_best, read_metrics
    from axolotl_spin.report.reading import NoRunError, read_run

    try:
        run = read_run(output_dir)
    except NoRunError as error:
        raise click.ClickException(str(error)) from error
    metrics = read_metrics(run.directory.metrics(entry.iteration) for entry in run.iterations)
    best = read_best(run.directory)
    print_wide(iteration_table(metrics, best), *best_lines(best), run.standing, file=result)


@spin.command("eval")
@click.argument("output_dir", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option(
    "--tasks",
    required=True,
    help="Of lm-eval, with commas between: names, or paths of a YAML task or of a folder of them.",
)
@click.option("--limit", type=click.IntRange(min=1), help="Only the first N samples of each task. Default: all.")
@click.option(
    "--backend", type=click.Choice(["hf", "vllm"]), default="hf", show_default=True,
    help="What asks the models: transformers in this process, or vLLM in one of its own.",
)  # fmt: skip
@click.option("--python", help="With vllm: the Python that has vLLM and lm-eval. Default: the one that runs this.")
@click.option("--model-args", default="", help="With vllm: arguments of lm-eval's vLLM model, as key=value,key=value.")
@click.option("--apply-chat-template", is_flag=True, help="Put the samples into the chat template.")
@click.option("--confirm-run-unsafe-code", is_flag=True, help="Allow tasks that run what the model writes as code.")
@click.option("--trust-remote-code", is_flag=True, help="Let code run that a model or tokenizer brings along.")
@click.option(
    "--batch-size", type=click.IntRange(min=1), default=8, show_default=True, help="With hf: requests at once."
)
@click.option("--device", help="With hf: of torch, such as cuda:1. Default: all GPUs that are there, else the CPU.")
@prints_result
def evaluate(tasks: str, result: TextIO, **options: Any) -> None:
    """Run benchmarks of lm-eval on the models of the run in OUTPUT_DIR: the start model and each iteration's.

    A model whose results are there already is not run again. They go to spin/start/evals.json and
    spin/iteration-N/evals.json, and into the table and the page.
    """
    from axolotl_spin.commands.eval import Evaluation, evaluate_models
    from axolotl_spin.monitor.tables import iteration_table, print_wide, read_metrics
    from axolotl_spin.report.reading import read_run

    asked = Evaluation(tasks=[task.strip() for task in tasks.split(",") if task.strip()], **options)
    for line in evaluate_models(asked):
        click.echo(printable(line), file=result)
    run = read_run(asked.output_dir)
    metrics = read_metrics(run.directory.metrics(entry.iteration) for entry in run.iterations)
    print_wide(iteration_table(metrics), file=result)


@spin.command()
@click.argument("output_dirs", nargs=-1, required=True, metavar="OUTPUT_DIR...", type=click.Path(path_type=Path))
@click.option(
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Where to write the page. Default: OUTPUT_DIR/spin/report.html; for a comparison, ./spin-comparison.html.",
)
@prints_result
def report(output_dirs: tuple[Path, ...], output: Path | None, result: TextIO) -> None:
    """Write a page that shows the run in OUTPUT_DIR, complete or not; of several runs, one that compares them."""
    from axolotl_spin.disk.directory import RunDirectory
    from axolotl_spin.report import INSTALL, write_report
    from axolotl_spin.report.reading import NoRunError

    if output is None:
        output = RunDirectory(output_dirs[0]).report if len(output_dirs) == 1 else Path("spin-comparison.html")
    elif output.exists() and not output.is_file():  # a pipe or a device would be replaced by a file
        raise click.ClickException(f"--output: {output} is no plain file: name another place")
    try:
        size = write_report(output_dirs, output)
    except ImportError as error:
        raise click.ClickException(f"no page without Plotly and Jinja ({error}): {INSTALL}") from error
    except NoRunError as error:
        raise click.ClickException(str(error)) from error
    except OSError as error:
        raise click.ClickException(
            f"the page could not be written; name another place with --output: {error}"
        ) from error
    click.echo(f"{output} ({size / 1e6:.1f} MB): open it in a browser; it needs no network", file=result)
