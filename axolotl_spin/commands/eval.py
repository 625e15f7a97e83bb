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

# the host's keys that say in which type a model computes
_PRECISION = ("bf16", "fp16", "bfloat16", "float16")
# and in what form a base model is loaded; the host has second names for some of these
_BASE = ("base_model_config", "overrides_of_model_config", "revision_of_model")


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
        click.ClickException: There is no run, something about the tasks or the backend, results that the run measured would
            be lost, or a model cannot be asked; names the option.
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
        ask = _backend(asked, run, benchmarks)
        models = saved_models(run)
        for saved in models:
            _refuse_replacing(saved, benchmarks)
        benchmarks.load()
    except (NoRunError, ValueError) as error:
        raise click.ClickException(str(error)) from error
    for saved in models:
        yield _evaluate(saved, run, benchmarks, ask, trusted=asked.trust_remote_code)
    for entry in run.iterations:
        if not _is_saved(run, entry.iteration):
            why = "is not over" if run.state != "complete" else "was not run, and the run is complete"
            if _is_over(run, entry.iteration):
                why = f"left no {run.directory.model(entry.iteration)} (`spin.save_iterations: false`)"
            yield f"iteration {entry.iteration} {why}: left out"


def _backend(asked: Evaluation, run: RunData, benchmarks: Benchmarks) -> Ask:
    # whoever wrote the run's folder wrote its config too: that it trusted the model's code says nothing here
    config = {**(run.about.get("config") or {}), "trust_remote_code": asked.trust_remote_code}
    # what `bf16: auto` was on the machine that trained, and what the host read
    config |= {key: run.fixed[key] for key in (*_PRECISION, *_BASE) if key in run.fixed}
    if asked.backend == "hf":
        return ask_by_transformers(config, asked.batch_size, asked.device)
    for path in benchmarks.files:
        if path.suffix != ".yaml":  # the process that has vLLM finds tasks by their names, in such files alone
            raise ValueError(f"`--tasks`: {path} is not found with `--backend vllm`: rename it to {path.stem}.yaml")
    from lm_eval.utils import simple_parse_args_string

    return ask_by_vllm(config, asked.python, simple_parse_args_string(asked.model_args))


def _refuse_replacing(saved: SavedModel, benchmarks: Benchmarks) -> None:
    """Refuses to ask a model in another way than the run itself did, which may select by what it measured.

    Raises:
        ValueError: Names the options and the file.
    """
    known = read_evals(saved.evals)
    if known is None or not known.get("weights") or known.get("run") != saved.mark:
        return
    if not same_model(known, _like(saved, benchmarks)):
        limit = known.get("limit")
        how = "without `--limit`" if limit is None else f"with `--limit {limit}`"
        how += f" and {'with' if known.get('chat_template') else 'without'} `--apply-chat-template`"
        raise ValueError(
            f"{saved.evals} holds what the run measured {how}, which results of another way would replace: ask in the same "
            "way, or move that file away"
        )


def _like(saved: SavedModel, benchmarks: Benchmarks) -> dict[str, Any]:
    return {"run": saved.mark, "limit": benchmarks.limit, "chat_template": benchmarks.chat_template}


def _evaluate(saved: SavedModel, run: RunData, benchmarks: Benchmarks, ask: Ask, *, trusted: bool) -> str:
    """Asks a model, unless what is asked for is on disk; returns what there is to say."""
    like, known = _like(saved, benchmarks), read_evals(saved.evals)
    if known is not None and same_model(known, like) and holds(known, benchmarks.wanted()):
        note_in_metrics(run.directory, saved.iteration, known)
        return f"{saved.name}: as in {saved.evals}: {summary(known)}"
    try:
        found = ask(saved, benchmarks)
    except (OSError, ValueError, ImportError, RuntimeError, AssertionError) as error:
        # a model that cannot be loaded, a package or memory that it lacks, an engine that ended, what lm-eval asserts
        raise click.ClickException(_why(error, saved, run, trusted=trusted)) from error
    whole = write_evals(saved.evals, collect(found, **like))
    note_in_metrics(run.directory, saved.iteration, whole)
    return f"{saved.name}: {summary(whole)}"


def _why(error: Exception, saved: SavedModel, run: RunData, *, trusted: bool) -> str:
    import torch

    message = f"{saved.name} ({saved.adapter or saved.model}): {str(error) or type(error).__name__}"
    if isinstance(error, torch.OutOfMemoryError):
        message += "\nlower `--batch-size`"
    if (run.about.get("config") or {}).get("trust_remote_code") and not trusted:
        message += "\nthe run had `trust_remote_code: true`: if you trust that code as well, add --trust-remote-code"
    return message


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


def _is_over(run: RunData, iteration: int) -> bool:
    return "spin/training_seconds" in run.metrics.get(iteration, {})


def _is_saved(run: RunData, iteration: int) -> bool:
    return _is_over(run, iteration) and run.directory.model(iteration).is_dir()
