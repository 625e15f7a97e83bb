"""Which held-out prompts the policy plays on after each iteration: the first of a fixed order, the same in every run."""

from __future__ import annotations

from typing import Any

import numpy as np
from axolotl.utils.logging import get_logger

from axolotl_spin.data.prompts import left_padding, prompt_features, prompts_of_row
from axolotl_spin.data.turns import NO_MARKS, Marks
from axolotl_spin.settings.spin import SpinConfig

LOG = get_logger(__name__)

# prompts where `spin.eval_prompts` is not set and there is held-out data
DEFAULT_PROMPTS = 64
# the order of the rows does not depend on the run's seed, so that runs with other seeds play on the same prompts
_ORDER = 0x5350494E


def refuse_missing_data(settings: SpinConfig, cfg: Any) -> None:
    """Refuses `spin.eval_prompts` where nothing is held out, before any data is prepared.

    Args:
        settings: The `spin` block.
        cfg: The host's config.

    Raises:
        ValueError: Names both keys.
    """
    if settings.eval_prompts and not cfg.get("val_set_size") and not cfg.get("test_datasets"):
        raise ValueError(
            f"`spin.eval_prompts: {settings.eval_prompts}` needs held-out data, but `val_set_size` is "
            f"{cfg.get('val_set_size') or 0} and there are no `test_datasets`: set one of them, or remove "
            "`spin.eval_prompts`"
        )


def heldout_prompts(dataset: Any, settings: SpinConfig, sequence_len: int, marks: Marks = NO_MARKS) -> Any:
    """Takes prompts and human answers from the host's prepared evaluation dataset.

    Rows without a prompt or without a labelled token are left out: the host's `eval_loss` may use them, but there is
    nothing to answer. So are prompts that leave less room than their human answer takes (`eval_sequence_len` may be the
    larger): own answers would be cut where the human's goes on. Only so many rows are read as it takes.

    Args:
        dataset: A `datasets.Dataset` with `input_ids` and `labels`, and `attention_mask` where there is one; or None.
        settings: The `spin` block.
        sequence_len: The host's.
        marks: See `prompts_of_row`.

    Returns:
        A `datasets.Dataset` with `prompt_ids`, `chosen_ids` (list<int32>) and `row` (index of the source row), of at most
        `spin.eval_prompts` rows; None where there is nothing to play on.

    Raises:
        ValueError: Prompts are asked for and no row has one.
    """
    from datasets import Dataset

    wanted = DEFAULT_PROMPTS if settings.eval_prompts is None else settings.eval_prompts
    if not wanted or dataset is None or not len(dataset):
        return None
    found: list[dict[str, Any]] = []
    unfit = long = 0
    for row in np.random.Generator(np.random.Philox(key=_ORDER)).permutation(len(dataset)).tolist():
        source = dataset[row]
        try:
            start = left_padding(source["labels"], source.get("attention_mask"))
            ids, labels = source["input_ids"][start:], source["labels"][start:]
            prompts = prompts_of_row(ids, labels, settings.turns, marks)
        except ValueError:
            prompts = []
        fitting = [prompt for prompt in prompts if len(prompt.prompt_ids) + len(prompt.chosen_ids) <= sequence_len]
        unfit, long = unfit + (not prompts), long + len(prompts) - len(fitting)
        found += [{**prompt._asdict(), "row": row} for prompt in fitting]
        if len(found) >= wanted:
            break
    if unfit or long:
        LOG.info(
            f"held-out play leaves out {unfit} rows without a prompt or without a human answer to it, and {long} prompts "
            f"that are longer than `sequence_len: {sequence_len}` with their human answer"
        )
    if not found and settings.eval_prompts:
        raise ValueError(
            f"`spin.eval_prompts: {settings.eval_prompts}`, but none of the {len(dataset)} held-out rows has a prompt with "
            f"a labelled answer within `sequence_len: {sequence_len}`: check `test_datasets`, or set `spin.eval_prompts: 0`"
        )
    return Dataset.from_list(found[:wanted], features=prompt_features()) if found else None
