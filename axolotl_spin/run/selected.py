"""Which figure selects the best iteration, what each model reached by it, and what follows: `spin/best.json`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from axolotl.utils.logging import get_logger

from axolotl_spin.data.spread import Spread, auc_spread, distance_from_half, nll_per_token
from axolotl_spin.disk.atomic import MARK, DamagedFileError, read_json, write_json, write_whole
from axolotl_spin.disk.directory import RunDirectory
from axolotl_spin.launched import saves_sharded
from axolotl_spin.run.identity import Identity
from axolotl_spin.run.prepare import SpinRun
from axolotl_spin.run.selection import Figure, Standing, judge
from axolotl_spin.settings.spin import SpinConfig

LOG = get_logger(__name__)

EVAL_LOSS, AUC = "eval_loss", "heldout_auc"
# the optimizer step at which held-out rows were evaluated
_STEP = b"axolotl_spin_step"
_PLAYED = ["human_ids", "own_ids", "human_logp", "own_logp"]
_NOT_PAIRED = "iterations are not compared row by row"
# the figures of the start model in iteration 0's `metrics.json`
START_LOSS, START_LOSS_STDERR = "spin/start_eval_loss", "spin/start_eval_loss_stderr"


def refuse_selection(settings: SpinConfig, cfg: Any) -> None:
    """Refuses a `spin.select` that will never exist, and keys that need one where there is none; before data are prepared.

    Args:
        settings: The `spin` block.
        cfg: The host's config.

    Raises:
        ValueError: Names the keys and the way out.
    """
    held_out = bool(cfg.get("val_set_size") or cfg.get("test_datasets"))
    select, keep = settings.select, settings.keep
    if select in (EVAL_LOSS, AUC) and not held_out:
        raise ValueError(
            f"`spin.select: {select}` needs held-out data, but there are neither `val_set_size` nor `test_datasets`: set "
            "one of them, or remove `spin.select`"
        )
    if select == AUC and settings.eval_prompts == 0:
        raise ValueError(
            "`spin.select: heldout_auc` needs held-out play, but `spin.eval_prompts: 0` turns it off: raise it"
        )
    if select is not None and select not in (EVAL_LOSS, AUC):
        task, slash, metric = select.partition("/")
        if not (task and slash and metric):
            raise ValueError(
                f"`spin.select: {select}` is no figure: write `eval_loss`, `heldout_auc`, or a task's metric as "
                "`task/metric`, such as `gsm8k/exact_match,strict-match`"
            )
        if not settings.eval_tasks:
            raise ValueError(f"`spin.select: {select}` needs `{task}` in `spin.eval_tasks`, which is not set")
    if select is None and not held_out:
        for key, given in (("patience", settings.patience), ("keep", keep if keep == "best" else None)):
            if given is not None:
                raise ValueError(
                    f"`spin.{key}: {given}` needs a figure to tell iterations by, and there is no held-out data: set "
                    "`val_set_size`, `test_datasets`, or `spin.select` to a task's metric"
                )
    if keep == "best":
        _refuse_keeping(cfg)


def _refuse_keeping(cfg: Any) -> None:
    """Refuses `spin.keep: best` where the final model is made in a way that an iteration's is not."""
    ways = {
        "hub_model_id": "the host uploads the last iteration's model before the best one could take its place; upload "
        "`output_dir` yourself",
        "qat": "the host converts the last iteration's model when it saves it; keep `spin.keep: last`",
        "llmcompressor": "the host compresses the last iteration's model when it saves it; keep `spin.keep: last`",
    }
    for key, why in ways.items():
        if cfg.get(key):
            raise ValueError(f"`spin.keep: best` does not work with `{key}`: {why}")
    if not cfg.get("adapter") and saves_sharded(cfg.get("deepspeed")):
        raise ValueError(
            "`spin.keep: best` needs models that are saved whole: set `gather_16bit_weights_on_model_save: true` under "
            "`zero_optimization` in the `deepspeed` config"
        )


Known = dict[int | None, tuple[Figure, bool | None]]


def stand(run: SpinRun, through: int, known: Known | None = None) -> Standing | None:
    """Judges a run's iterations by what is on disk.

    Args:
        run: The run.
        through: The last iteration that counts.
        known: Figures of iterations that an earlier call has read, so that a long run reads none again; more are added.

    Returns:
        None where nothing selects.
    """
    if run.select is None:
        return None
    known = {} if known is None else known
    known.pop(through, None)  # which may have been judged before its end
    for iteration in (None, *range(through + 1)):
        if iteration not in known:
            known[iteration] = _figure(run, iteration)
    reached = [known[iteration] for iteration in (None, *range(through + 1))]
    lower = run.select in (EVAL_LOSS, AUC) or not any(higher for _, higher in reached)
    start, *figures = [figure for figure, _ in reached]
    return judge(run.select, figures, start, lower=lower, patience=run.settings.patience)


def ended_at(run: SpinRun, step: int) -> Standing | None:
    """Returns the standing by which `spin.patience` ended a run at a step; None where it did not."""
    ends = {entry.first_step + entry.steps: entry.iteration for entry in run.plan.iterations}
    standing = stand(run, ends[step]) if run.settings.patience and step in ends else None
    return standing if standing is not None and standing.ended else None


def write_best(run: SpinRun, standing: Standing, **done: Any) -> None:
    """Writes `best.json`. Call it on one rank.

    Args:
        run: The run.
        standing: See `stand`.
        done: What was done with it: `kept`, the iteration whose model is in `output_dir`; `alone`, the iteration whose
            model alone is kept with `save_iterations: false`.
    """
    write_json(run.directory.best, {**standing.to_json(), "kept": None, "alone": None, **done})


def _figure(run: SpinRun, iteration: int | None) -> tuple[Figure, bool | None]:
    """Returns what a model reached, and whether more is better where its file says that."""
    assert run.select is not None
    metrics = _json(run.directory.metrics(iteration or 0))
    mark = mark_of(run.identity, iteration)
    if run.select == EVAL_LOSS:
        names = (START_LOSS, START_LOSS_STDERR) if iteration is None else (EVAL_LOSS, f"{EVAL_LOSS}_stderr")
        value, stderr = (_number(metrics, name) for name in names)
        return Figure(value, stderr, eval_spread(run.directory, iteration, mark)), None
    if run.select == AUC:
        name = "spin/heldout_start_auc" if iteration is None else "spin/heldout_auc"
        value, stderr = (_number(metrics, key) for key in (name, f"{name}_stderr"))
        distance = None if value is None else abs(value - 0.5)
        spread = play_spread(run.directory, iteration, mark)
        return Figure(distance, stderr, None if spread is None else distance_from_half(spread)), None
    task, _, metric = run.select.partition("/")
    found = _json(run.directory.of_model(iteration) / "evals.json")
    asked: dict[str, Any] = {
        "run": mark if iteration is not None else run.identity.before(0),
        "limit": run.settings.eval_limit,
        "chat_template": run.settings.eval_chat_template,
    }
    if any(found.get(key) != value for key, value in asked.items()):  # another run's, or asked in another way
        return Figure(), None
    try:
        entry = found["tasks"][task]["metrics"][metric]
        return Figure(_number(entry, "value"), _number(entry, "stderr")), bool(entry["higher_is_better"])
    except (KeyError, TypeError):
        return Figure(), None


def mark_of(identity: Identity, iteration: int | None) -> str:
    """Returns what identifies the model that an iteration resulted in; the start model without one."""
    return identity.through(-1 if iteration is None else iteration)


def write_eval_rows(path: Path, rows: dict[str, np.ndarray], mark: str, step: int) -> None:
    """Writes each held-out row's NLL. Call it on one rank.

    Args:
        path: See `RunDirectory.eval_rows`.
        rows: `key`, `nll` (nats) and `tokens`, each (rows,).
        mark: See `mark_of`.
        step: Optimizer steps of the run by then.
    """
    table = pa.table(rows).replace_schema_metadata({MARK: mark.encode(), _STEP: str(step).encode()})
    write_whole(path, lambda aside: pq.write_table(table, aside, write_page_checksum=True))


def has_eval_rows(path: Path, mark: str, step: int) -> bool:
    """Whether the rows on disk are those that a model gave at a step."""
    try:
        found = pq.read_schema(path).metadata or {}
    except (OSError, pa.ArrowException):
        return False
    return (found.get(MARK), found.get(_STEP)) == (mark.encode(), str(step).encode())


def eval_spread(directory: RunDirectory, iteration: int | None, mark: str) -> Spread | None:
    """Returns a model's `eval_loss` with what each row moves it by; None where its rows are not on disk."""
    table = read_marked(directory.eval_rows(iteration), ["key", "nll", "tokens"], mark, _NOT_PAIRED)
    if table is None or not len(table):
        return None
    keys, nll, tokens = (table[name].to_numpy() for name in table.column_names)
    found = nll_per_token(nll, tokens, keys)
    return found if math.isfinite(found.value) else None


def play_spread(directory: RunDirectory, iteration: int | None, mark: str) -> Spread | None:
    """Returns a model's AUC of held-out play with what each prompt moves it by; None where it is not on disk."""
    table = read_marked(directory.heldout(iteration), _PLAYED, mark, _NOT_PAIRED)
    return None if table is None else spread_of_play(table)


def spread_of_play(table: pa.Table) -> Spread | None:
    """Returns the AUC of a play with what each prompt moves it by; None where no answer or no log-prob says one.

    Args:
        table: With the columns `human_ids`, `own_ids`, `human_logp` and `own_logp`. Empty own answers are left out: they
            have no token to be likely.
    """
    lengths = [pc.list_value_length(table[f"{who}_ids"]).to_numpy() for who in ("human", "own")]
    human, own = (
        table[f"{who}_logp"].to_numpy() / np.maximum(n, 1) for who, n in zip(("human", "own"), lengths, strict=True)
    )
    answered = lengths[1] > 0
    if not answered.any() or not (np.isfinite(human[answered]).all() and np.isfinite(own[answered]).all()):
        return None
    return auc_spread(human, own, answered)


def read_marked(path: Path, columns: list[str], mark: str, without: str) -> pa.Table | None:
    """Reads what a model left on disk; None where it is not there, damaged, which is logged, or another model's.

    Args:
        path: A parquet file.
        columns: To read.
        mark: See `mark_of`.
        without: What there is not where it is damaged, for the log.
    """
    try:
        table = pq.read_table(path, columns=columns, page_checksum_verification=True)
    except FileNotFoundError:
        return None
    except (OSError, pa.ArrowException) as error:
        LOG.warning(f"{path} is damaged ({str(error).splitlines()[0]}): {without}")
        return None
    return table if (table.schema.metadata or {}).get(MARK) == mark.encode() else None


def _json(path: Path) -> dict[str, Any]:
    try:
        return read_json(path)
    except FileNotFoundError:
        return {}
    except DamagedFileError as error:
        LOG.warning(f"{error}: its figures are left out")
        return {}


def _number(row: dict[str, Any], name: str) -> float | None:
    value = row.get(name)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)
