"""How answers end: with which tokens, how many human answers have one, and that both answers of a pair end alike.

An end that only the opponent's answer has would tell the two apart by itself, and the policy would unlearn to stop. Where
the human answer has no end among its labels, the opponent's takes no part either: it is left out of `rejected_ids`, whose
`finish_reason` stays `stop`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from axolotl_spin.data.answers import flat
from axolotl_spin.data.prompts import left_padding
from axolotl_spin.data.row_cache import PREPARE_AGAIN
from axolotl_spin.data.turns import TO_END

# a special token ends answers if it ends at least this share of the human ones ...
_NOTICEABLE = 0.01
# ... and at least this share of all its occurrences in them is at their end
_MOSTLY = 0.5
# rows that are looked at for what stands behind their answer
_SAMPLE = 200


def last_ids(answers: pa.ListArray) -> np.ndarray:
    """Returns (answers,) the last id of each, -1 of an empty one."""
    ids, lengths = flat(answers)
    found = np.full(len(lengths), -1, dtype=np.int64)
    found[lengths > 0] = ids[(np.cumsum(lengths) - 1)[lengths > 0]]
    return found


def end_alike(
    chosen: pa.ListArray, rejected: pa.ListArray, stops: Iterable[int], limit: int | None = None
) -> pa.ListArray:
    """Takes the end token off the opponent's answers where the human's have none.

    A human answer of as many tokens as the opponent may draw at the most was cut as the opponent's are: both are samples of
    the same kind, and the opponent's stays as it was drawn.

    Args:
        chosen: Ids of human answers.
        rejected: Ids of the opponent's.
        stops: Tokens that end an answer.
        limit: The `spin.generation.max_new_tokens`, or None for the default.

    Returns:
        The opponent's answers; one that was nothing but its end is empty where the human's has none.
    """
    ends = sorted(stops)
    alone = np.isin(last_ids(rejected), ends) & ~np.isin(last_ids(chosen), ends)
    if limit is not None:
        alone &= flat(chosen)[1] != limit
    if not alone.any():
        return rejected
    ids, lengths = flat(rejected)
    kept = np.ones(len(ids), dtype=bool)
    kept[(np.cumsum(lengths) - 1)[alone]] = False
    offsets = np.concatenate([[0], np.cumsum(lengths - alone)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(ids[kept], type=pa.int32()))


def pairs_end_alike(pairs: pa.RecordBatch, stops: Iterable[int], limit: int | None = None) -> pa.RecordBatch:
    """Returns pairs after `end_alike`."""
    place = pairs.schema.get_field_index("rejected_ids")
    rejected = end_alike(pairs["chosen_ids"], pairs["rejected_ids"], stops, limit)
    return pairs.set_column(place, pairs.schema.field(place), rejected.cast(pairs.schema.field(place).type))


def stop_token_ids(
    prompts: Any, *, ends: Iterable[int], special: Iterable[int], sequence_len: int, claimed: Iterable[int] = ()
) -> tuple[int, ...]:
    """Returns the tokens that end an answer.

    They are those that are said to (`declared_ends`), and every special token that ends a noticeable share of the human
    answers: a model trained on it must be able to stop with it. A token that stands inside answers more often than at
    their end is none, also where `eot_tokens` alone names it (harmony's `<|end|>`, which closes thoughts), and answers that
    are cut at `sequence_len` do not say how answers end.

    Args:
        prompts: `datasets.Dataset` with `prompt_ids` and `chosen_ids`.
        ends: End tokens that are known.
        special: The tokenizer's special and added tokens.
        sequence_len: The host's.
        claimed: Those of `ends` that may be none; see `Marks`.
    """
    last: Counter[int] = Counter()
    among: Counter[int] = Counter()
    marks, answers = sorted(special), 0
    for batch in prompts.select_columns(["prompt_ids", "chosen_ids"]).with_format("arrow").iter(batch_size=10_000):
        chosen, whole = batch["chosen_ids"].combine_chunks(), ~_cut(batch, sequence_len)
        ids, lengths = flat(chosen)
        among.update(ids[np.isin(ids, marks) & np.repeat(whole, lengths)].tolist())
        at_end = last_ids(chosen)[whole]
        last.update(at_end[np.isin(at_end, marks)].tolist())
        answers += int(whole.sum())
    found = {token for token, count in last.items() if count >= max(_NOTICEABLE * answers, _MOSTLY * among[token])}
    within = {token for token in claimed if last[token] < _MOSTLY * among[token]}
    return tuple(sorted(({*ends} - within) | found))


@dataclass(frozen=True)
class Endings:
    """How human answers end, and which rows have none.

    Attributes:
        answers: All of them.
        without: Those without an end token among their labels.
        cut: Of these, those that `sequence_len` has cut.
        behind: Special token that stands most often right behind the others, without a label; None where there is none.
        rows: Of the data, as far as they were read.
        unanswered: Of these, those without an answer.
    """

    answers: int
    without: int
    cut: int
    behind: int | None
    rows: int
    unanswered: int


def count_endings(
    prompts: Any, source: Any, *, stops: Iterable[int], special: set[int], sequence_len: int, first: int | None = None
) -> Endings:
    """Counts how human answers end, and rows that have none.

    Args:
        prompts: `datasets.Dataset` with `prompt_ids`, `chosen_ids` and `row`.
        source: The rows that they were made of, with `input_ids` and `labels`, and `attention_mask` where there is one.
        stops: Tokens that end an answer.
        special: The tokenizer's special and added tokens.
        sequence_len: The host's.
        first: The most prompts that were asked for; None for all.
    """
    ends, without, cut, places, start = sorted(stops), 0, 0, list[int](), 0
    answered, last = 0, -1
    columns = ["prompt_ids", "chosen_ids", "row"]
    for batch in prompts.select_columns(columns).with_format("arrow").iter(batch_size=10_000):
        rows = batch["row"].to_numpy()  # in order
        answered, last = answered + int(np.count_nonzero(np.diff(rows, prepend=last))), int(rows[-1])
        open_ended = ~np.isin(last_ids(batch["chosen_ids"].combine_chunks()), ends)
        at_limit = open_ended & _cut(batch, sequence_len)
        places += (start + np.flatnonzero(open_ended & ~at_limit)[:_SAMPLE]).tolist()
        without, cut, start = without + int(open_ended.sum()), cut + int(at_limit.sum()), start + len(open_ended)
    behind: Counter[int] = Counter()
    for place in places[:_SAMPLE]:
        prompt = prompts[place]
        row = source[prompt["row"]]
        at = left_padding(row["labels"], row.get("attention_mask"))
        at += len(prompt["prompt_ids"]) + len(prompt["chosen_ids"])
        following = row["input_ids"][at : at + TO_END + 1]
        behind.update([token for token in following if token in special][:1])
    read = len(source) if first is None or len(prompts) < first else last + 1
    most = behind.most_common(1)[0][0] if behind else None
    return Endings(len(prompts), without, cut, most, rows=read, unanswered=read - answered)


def describe_endings(endings: Endings, cfg: Any, tokenizer: Any) -> str:
    """Returns a line that says how many rows have no answer, and how many answers no end; empty where all have both.

    Args:
        endings: See `count_endings`.
        cfg: The host's normalized config.
        tokenizer: The host's.
    """
    lost = (
        f"{endings.unanswered} of {endings.rows} rows have no trained answer (it is empty, not trained, or not found) and "
        "are left out"
    )
    return "; ".join(filter(None, [lost if endings.unanswered else "", _without_end(endings, cfg, tokenizer)]))


def _without_end(endings: Endings, cfg: Any, tokenizer: Any) -> str:
    """Says how many human answers have no end, and which key mends it."""
    if not endings.without:
        return ""
    ways = []
    again = "" if cfg.skip_prepare_dataset else f"; {PREPARE_AGAIN}"
    if endings.cut:
        ways.append(
            f"{endings.cut} are cut by `sequence_len: {cfg.sequence_len}`, so raise it, or leave them out "
            f"(`excess_length_strategy: drop`{again})"
        )
    known = {tokenizer.eos_token_id, *tokenizer.convert_tokens_to_ids(list(cfg.eot_tokens or ()))}
    if endings.behind in known:
        token = tokenizer.convert_ids_to_tokens(endings.behind)
        ways.append(f"`{token}` stands behind answers without being trained, which `train_on_eos: turn` changes")
    elif endings.behind is not None:
        token = tokenizer.convert_ids_to_tokens(endings.behind)
        named = [*(cfg.eot_tokens or ()), token]
        ways.append(f"`{token}` stands behind answers, but is no end token to the host: `eot_tokens: {named}`")
    elif endings.without > endings.cut:
        ways.append(
            f"no special token stands behind the others: end them in the data, with `{tokenizer.eos_token}`, say{again}"
        )
    return (
        f"{endings.without} of {endings.answers} human answers have no end token among their labels, so the end of the "
        f"opponent's answers to their prompts takes no part either, and when to stop is not learnt there: {'; '.join(ways)}"
    )


def refuse_endless(endings: Endings, cfg: Any, tokenizer: Any, stops: Iterable[int]) -> None:
    """Refuses data in which no answer has an end, unless it is said to be meant so.

    Args:
        endings: See `count_endings`.
        cfg: The host's normalized config.
        tokenizer: The host's.
        stops: Tokens with which the model ends its answers.

    Raises:
        ValueError: Names the keys.
    """
    meant = all(entry.get("train_on_eos") == "none" for entry in cfg.datasets or [])
    names = ", ".join(f"`{tokenizer.convert_ids_to_tokens(token)}`" for token in stops)
    if endings.without == endings.answers and names and not meant:
        raise ValueError(
            f"{_without_end(endings, cfg, tokenizer)}. The model ends its answers with {names}, which no human answer "
            "does. Where answers are meant to have no end, say so with `train_on_eos: none` in each entry of `datasets:`"
        )


def _cut(batch: pa.Table, sequence_len: int) -> np.ndarray:
    """Returns (rows,) whether a row's answer reaches the most tokens that a row may have."""
    lengths = [pc.list_value_length(batch[name]).to_numpy() for name in ("prompt_ids", "chosen_ids")]
    return sum(lengths) >= sequence_len
