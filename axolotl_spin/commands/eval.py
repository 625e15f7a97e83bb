"""`axolotl spin eval`: benchmarks of the models that a run left on disk."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from axolotl_spin.evals.results import collect, holds, note_in_metrics, read_evals, same_model, summary, write_evals
from axolotl_spin.evals.saved import Ask, SavedModel, ask_by_transformers, ask_by_vllm, base_of
from axolotl_spin.evals.tasks import Benchmarks, asked_benchmarks
from axolotl_spin.report.reading import NoRunError, RunData, read_run
from axolotl_spin.run.identity import Identity


@dataclass(frozen=True)
class Evaluation:
    """What is asked for; see the command's options."""

    output_dir: Path
    tasks: Sequence[str]
    limit: int | None
    backend: str
    python: str | None
    model_args: str
    apply_chat_template: bool
    confirm_run_unsafe_code: bool
    trust_remote_code: bool
    batch_size: int
    device: str | None


def evaluate_models(asked: Evaluation) -> Iterator[str]:
    """Runs benchmarks on the start model and on each iteration's, those aside whose results are on disk already.

    Args:
        asked: By the user.

    Yields:
        A line for each model.

    Raises:
        click.ClickException: There is no run, or something about the tasks or the backend; names the option.
    """
    try:
        run = read_run(asked.output_dir)
        benchmarks = asked_benchmarks(
            asked.tasks,
            limit=asked.limit,
            chat_template=asked.apply_chat_template,
            unsafe_code=asked.confirm_run_unsafe_code,
            key="--tasks",
        )
        ask = _backend(asked, run)
        benchmarks.load()
    except (NoRunError, ValueError) as error:
        raise click.ClickException(str(error)) from error
    for saved in saved_models(run):
        yield _evaluate(saved, run, benchmarks, ask, trusted=asked.trust_remote_code)
    for entry in run.iterations:
        if not _is_saved(run, entry.iteration):
            why = "is not over" if "spin/training_seconds" not in run.metrics.get(entry.iteration, {}) else (
                f"left no {run.directory.model(entry.iteration)} (`spin.save_iterations: false`)"
            )  # fmt: skip
            yield f"iteration {entry.iteration} {why}: left out"


def _backend(asked: Evaluation, run: RunData) -> Ask:
    # whoever wrote the run's folder wrote its config too: that it trusted the model's code says nothing here
    config = {**(run.about.get("config") or {}), "trust_remote_code": asked.trust_remote_code}
    if asked.backend == "hf":
        return ask_by_transformers(config, asked.batch_size, asked.device)
    from lm_eval.utils import simple_parse_args_string

    return ask_by_vllm(config, asked.python, simple_parse_args_string(asked.model_args))


def _evaluate(saved: SavedModel, run: RunData, benchmarks: Benchmarks, ask: Ask, *, trusted: bool) -> str:
    """Asks a model, unless what is asked for is on disk; returns what there is to say."""
    like: dict[str, Any] = {"run": saved.mark, "limit": benchmarks.limit, "chat_template": benchmarks.chat_template}
    known = read_evals(saved.evals)
    if known is not None and same_model(known, like) and holds(known, benchmarks.wanted()):
        note_in_metrics(run.directory, saved.iteration, known)
        return f"{saved.name}: as in {saved.evals}: {summary(known)}"
    try:
        found = ask(saved, benchmarks)
    except (OSError, ValueError) as error:  # a model that cannot be loaded, an engine that ended
        message = f"{saved.name} ({saved.adapter or saved.model}): {error}"
        if (run.about.get("config") or {}).get("trust_remote_code") and not trusted:
            message += (
                "\nthe run had `trust_remote_code: true`: if you trust that code as well, add --trust-remote-code"
            )
        raise click.ClickException(message) from error
    write_evals(saved.evals, collect(found, **like))
    whole = read_evals(saved.evals)
    assert whole is not None
    note_in_metrics(run.directory, saved.iteration, whole)
    return f"{saved.name}: {summary(whole)}"


def saved_models(run: RunData) -> list[SavedModel]:
    """Returns the start model and those of the iterations that are over and were kept, in order."""
    identity = Identity(run.fixed, run.plan.get("planned") or {}, run.plan["iterations"]) if run.fixed else None
    directory = run.directory
    over = [entry.iteration for entry in run.iterations if _is_saved(run, entry.iteration)]
    start, adapter = str(run.fixed.get("base_model", "")), run.fixed.get("lora_model_dir")
    # the run's own, which may have tokens that the start model's has not
    tokenizers = [*(directory.model(iteration) for iteration in over), directory.root.parent]
    tokenizer = next((str(path) for path in tokenizers if (path / "tokenizer_config.json").exists()), start)
    found = []
    if start:
        mark = identity.before(0) if identity else None
        under = Path(str(adapter)) if adapter else None
        found.append(SavedModel("start", None, start, under, tokenizer, directory.start_evals, mark))
    for iteration in over:
        folder = directory.model(iteration)
        base = base_of(folder)
        found.append(
            SavedModel(
                name=f"iteration {iteration}",
                iteration=iteration,
                model=base or str(folder),
                adapter=folder if base else None,
                tokenizer=tokenizer,
                evals=directory.evals(iteration),
                mark=identity.through(iteration) if identity else None,
            )
        )
    return found


def _is_saved(run: RunData, iteration: int) -> bool:
    over = "spin/training_seconds" in run.metrics.get(iteration, {})
    return over and run.directory.model(iteration).is_dir()
