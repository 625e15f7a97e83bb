"""The command `axolotl spin plan`: validates a config, tokenises its data, tells what the run will do. Loads no weights."""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from axolotl.utils.config import resolve_dtype

from axolotl_spin.commands.config import load_config
from axolotl_spin.commands.plan.advice import Facts, advise
from axolotl_spin.commands.plan.lengths import describe_lengths, heaviest, limits, repeated
from axolotl_spin.commands.plan.memory import Load, estimate_memory, saved_bytes
from axolotl_spin.commands.plan.size import ModelSize, model_size
from axolotl_spin.commands.plan.timing import Measured, Rate, Tokens, estimate_time, measure
from axolotl_spin.compat import text_config
from axolotl_spin.data.endings import describe_endings
from axolotl_spin.data.prompts import token_counts
from axolotl_spin.data.thoughts import told_apart
from axolotl_spin.disk.atomic import DamagedFileError, read_json
from axolotl_spin.generation.rows import ROOM
from axolotl_spin.run.prepare import SpinRun
from axolotl_spin.run.resume import is_complete
from axolotl_spin.settings.generation import DEFAULT_MAX_NEW_TOKENS
from axolotl_spin.training.layouts import Layout, shared_mask_size


@dataclass(frozen=True)
class Given:
    """What the user knows of the machine.

    Attributes:
        ranks: Of the launch.
        generation: Drawn tokens per second over all ranks.
        training: Tokens of pairs (prompt and both answers) per second, forward and backward.
        scoring: The same, forward only.
    """

    ranks: int = 1
    generation: float | None = None
    training: float | None = None
    scoring: float | None = None


def plan_run(config: str, given: Given) -> tuple[SpinRun, dict[str, Any]]:
    """Lays out a run as its start would, without starting it.

    Args:
        config: The YAML.
        given: What the user knows of the machine.

    Returns:
        The run, and everything that is known of it as plain JSON: `plan.json`'s content and `prompts`,
        `prompts_per_iteration`, `schedule_epochs`, `tokens`, `lengths`, `cut`, `endings`, `memory`, `time`, `selection`,
        `folder` and `advice`.

    Raises:
        click.ClickException: The config or its data is not valid.
    """
    cfg, plugin = load_config(config, logged=False)
    cfg.world_size = given.ranks
    if cfg.torch_dtype is None:  # with `use_ray` the host leaves it to its workers
        resolve_dtype(cfg)
    try:
        plugin.load_datasets(cfg, preprocess=True)
    except ValueError as error:
        raise click.ClickException(f"{config}: {error}") from error
    assert plugin.run is not None
    run = plugin.run
    prompts, answers = (token_counts(run.prompts, name) for name in ("prompt_ids", "chosen_ids"))
    most = run.settings.generation.max_new_tokens or DEFAULT_MAX_NEW_TOKENS
    longest = limits(prompts, max_new_tokens=run.settings.generation.max_new_tokens, sequence_len=run.sequence_len)
    measured = _with_given(measure(run.directory, run.plan), given)
    tokens = _tokens(run, prompts, answers, longest, measured.answer_tokens)
    size, memory = _memory(cfg, run, prompts, answers, longest)
    figures = {
        **run.plan.to_json(),
        "prompts": len(run.prompts),
        "prompts_per_iteration": run.settings.prompts_per_iteration,
        "schedule_epochs": run.settings.schedule_epochs or run.plan.num_epochs,
        "tokens": [{"iteration": i, "drawn": part.drawn, "pairs": part.pairs} for i, part in enumerate(tokens)],
        "lengths": {"prompt": describe_lengths(prompts), "human_answer": describe_lengths(answers)},
        "cut": {
            "sequence_len": run.sequence_len,
            "max_new_tokens": most,
            "human_answers_beyond_limit": int((answers > longest).sum()),
            "prompts_with_less_room": int((longest < most).sum()),
        },
        "endings": {**asdict(run.endings), "text": describe_endings(run.endings, cfg, run.tokenizer)},
        "memory": memory,
        "time": estimate_time(run.plan, tokens, measured),
        "selection": {"select": run.select, "keep": run.settings.keep, "patience": run.settings.patience},
        "folder": _folder(run),
    }
    facts = Facts(
        settings=run.settings,
        plan=run.plan,
        prompts=prompts,
        answers=answers,
        limits=longest,
        repeated=repeated(run.prompts),
        adapter=(cfg.adapter or None),
        pure_half=_pure_half(cfg),
        trained_for=_trained_for(cfg),
        sequence_len=run.sequence_len,
        disk=_disk(run, cfg, size),
        thoughts=_thoughts(run),
    )
    return run, {**figures, "advice": advise(facts)}


# what keeps fp32 weights, or the remainder of what it rounds, by itself
_OWN_PRECISION = ("optimi_adamw", "stable_adamw", "flash_adamw", "flash_adam", "flash_sgd", "flash_sgdw", "flash_lion")


def _thoughts(run: SpinRun) -> str:
    """Says what is wrong with the thoughts in the newest iteration's own answers, where some are on disk."""
    for entry in reversed(run.plan.iterations):
        try:
            pairs = pq.read_table(run.directory.pairs(entry.iteration), columns=["chosen_ids", "rejected_ids"])
        except (OSError, pa.ArrowException):
            continue
        new = pairs.slice(0, entry.new_rows)
        return told_apart(run.thoughts, new["chosen_ids"], new["rejected_ids"])
    return ""


def _pure_half(cfg: Any) -> bool:
    """Whether steps are added to weights in half precision, and what rounding takes from them is lost."""
    if cfg.adapter or not (cfg.bf16 or cfg.fp16 or cfg.bfloat16 or cfg.float16):
        return False
    deepspeed = cfg.deepspeed if isinstance(cfg.deepspeed, dict) else None
    if deepspeed is not None:
        return bool((deepspeed.get("bf16") or {}).get("bf16_master_weights_and_grads"))
    optimizer = str(getattr(cfg.optimizer, "value", cfg.optimizer))
    asked = str(cfg.optim_args or "").lower().replace(" ", "").replace("'", "").replace(":", "=")
    kept = any(f"{key}=true" in asked for key in ("bf16_stochastic_round", "use_kahan_summation", "kahan_sum"))
    return not (kept or optimizer in _OWN_PRECISION)


def _with_given(measured: Measured, given: Given) -> Measured:
    def rate(kind: str) -> Rate:
        value = getattr(given, kind)
        return Rate(value, "given") if value else getattr(measured, kind)

    return replace(measured, generation=rate("generation"), scoring=rate("scoring"), training=rate("training"))


def _tokens(
    run: SpinRun, prompts: np.ndarray, answers: np.ndarray, longest: np.ndarray, answer_tokens: float | None
) -> list[Tokens]:
    """Returns each iteration's tokens: answers as long as the human's at the least, all cut at the most; or as measured."""
    new: list[tuple[tuple[float, float], tuple[float, float]]] = []  # drawn, and of the new pairs
    found = []
    for entry in run.plan.iterations:
        if run.given is not None and entry.iteration == 0:
            new.append(((0.0, 0.0), (float(run.given.tokens),) * 2))
        else:
            rows = run.asked(entry)
            rows = np.arange(len(prompts)) if rows is None else rows
            if answer_tokens is not None:
                drawn = (answer_tokens * len(rows),) * 2
            else:
                drawn = (float(np.minimum(answers, longest)[rows].sum()), float(longest[rows].sum()))
            asked = float((prompts + answers)[rows].sum())
            new.append((drawn, (asked + drawn[0], asked + drawn[1])))
        trained = new[max(0, entry.iteration - run.settings.history) :]
        found.append(Tokens(new[-1][0], (sum(pairs[0] for _, pairs in trained), sum(pairs[1] for _, pairs in trained))))
    return found


def _memory(
    cfg: Any, run: SpinRun, prompts: np.ndarray, answers: np.ndarray, longest: np.ndarray
) -> tuple[ModelSize | None, dict[str, Any]]:
    at_once = min(run.settings.generation.batch_size, len(prompts))

    def largest(layout: Layout) -> tuple[np.ndarray, int]:
        return heaviest(prompts, answers, longest, layout=layout, pairs=int(cfg.micro_batch_size))

    try:
        # pictures count as in padded rows, where a prompt stands before each answer
        size = model_size(cfg, _pictures(run, largest("padded")[0]))
    except ValueError as error:
        return None, {"missing": str(error)}
    layout: Layout = size.layout if run.images is None else "padded"
    rows, tokens = largest(layout)
    masks = {
        "shared": shared_mask_size((prompts + answers + longest)[rows].tolist(), size.hidden or 1024),
        "packed": 0,
        "padded": tokens**2 // (2 * len(rows)),  # of each row, its tokens squared
    }
    load = Load(
        ranks=run.launch.ranks,
        sharding=run.launch.sharding,
        training_tokens=tokens,
        answer_tokens=int(np.sort(answers + longest)[::-1][: len(rows)].sum()),
        # every row of the cache is as wide as the widest
        generation_tokens=None if run.served else at_once * (int((prompts + longest).max()) + ROOM),
        pairs=len(rows),
        mask=masks[layout],
        layout=layout,
    )
    return size, estimate_memory(size, cfg, load)


def _pictures(run: SpinRun, rows: np.ndarray) -> dict[str, Any] | None:
    """Returns what the forward takes for the pictures of some prompts, once for each answer; None where there are none."""
    if run.images is None:
        return None
    asked = run.prompts.select(rows)
    found = run.images.inputs(asked["row"][:], asked["prompt_ids"][:]).of_images
    return {name: torch.cat([values, values]) for name, values in found.items()} or None


def _trained_for(cfg: Any) -> int | None:
    from axolotl.loaders.utils import load_model_config

    try:
        config = load_model_config(cfg)
    except (OSError, ValueError):
        return None
    text = text_config(config)
    return getattr(text, "max_position_embeddings", None)


def _disk(run: SpinRun, cfg: Any, size: ModelSize | None) -> tuple[int, int] | None:
    """Returns the bytes that models of iterations take which are not on disk yet, and the bytes that are free."""
    if size is None or not run.settings.save_iterations:
        return None
    there = next(path for path in [run.directory.root, *run.directory.root.absolute().parents] if Path(path).exists())
    coming = [entry for entry in run.plan.iterations if not run.directory.model(entry.iteration).exists()]
    return saved_bytes(size, cfg, run.launch.sharding) * len(coming), shutil.disk_usage(there).free


def _folder(run: SpinRun) -> dict[str, Any]:
    """Returns what is in `output_dir`: nothing, this run, or another one with what differs."""
    where: dict[str, Any] = {"output_dir": str(run.directory.root.parent)}
    try:
        kept = read_json(run.directory.plan)
        changes = run.identity.changes(kept)
    except FileNotFoundError:
        return {**where, "holds": "no run"}
    except (DamagedFileError, AttributeError, TypeError):
        return {**where, "holds": "a damaged plan.json"}
    if changes:
        return {**where, "holds": "another run", "changes": [line.strip() for line in changes]}
    done = is_complete(run, kept.get("completed_steps"))
    why = f" ({done})" if isinstance(done, str) else ""
    return {**where, "holds": f"this run, complete{why}" if done else "this run, started"}
