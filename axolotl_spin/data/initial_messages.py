"""Rows of the SPIN authors' format become pairs of token ids, by the chat template and strategy of the training data.

Their `generated` was drawn as tokens, but is kept as text: it is tokenised as a turn, which ends it. An exported set says
in `finish_reason` which answers were cut; those get no end. An empty answer is its end token alone, as a model draws it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from axolotl.utils.logging import get_logger
from datasets import Dataset, DatasetDict, Features, List, Value, load_dataset, load_from_disk

from axolotl_spin import uclaml
from axolotl_spin.data.initial_pairs import GivenPairs, naming
from axolotl_spin.data.marks import declared_ends, special_tokens, turn_marks
from axolotl_spin.data.pairs import BATCH_ROWS
from axolotl_spin.data.prompts import Prompt, prompts_of_row
from axolotl_spin.data.row_cache import map_rows
from axolotl_spin.data.turns import answer_spans

LOG = get_logger(__name__)

# what the host reads of a dataset's entry for the template and the labels, not for where the messages are
_TEMPLATE_KEYS = (
    "chat_template",
    "chat_template_jinja",
    "train_on_eos",
    "train_on_eot",
    "roles_to_train",
    "drop_system_message",
    "split_thinking",
)
_FEATURES = {
    "prompt_ids": List(Value("int32")),
    "chosen_ids": List(Value("int32")),
    "rejected_ids": List(Value("int32")),
    "finish_reason": Value("string"),
}

Tokenize = Callable[[list[dict[str, Any]]], Prompt | None]


def read_conversations(source: str, cfg: Any, tokenizer: Any) -> GivenPairs:
    """Reads a set in the authors' format.

    Args:
        source: The `spin.initial_pairs`: a JSON or parquet file, a folder, or the name of a dataset on the hub, of which
            the split `train` is taken.
        cfg: The host's normalized config.
        tokenizer: The host's.

    Raises:
        ValueError: It cannot be read, or a row is not of that format; names `spin.initial_pairs`.
    """
    rows = _load(source)
    if "real" not in rows.column_names:
        raise ValueError(
            f"`spin.initial_pairs: {source}`: its rows have no `real` (they have {', '.join(rows.column_names)}): give "
            "rows with `real` and `generated` messages, a `pairs.parquet`, or a folder made by `axolotl spin export`"
        )
    with naming(source):
        pairs = _tokenised(rows, cfg, tokenizer)
    if left_out := len(rows) - len(pairs):
        LOG.warning(
            f"spin.initial_pairs: {left_out} of {len(rows)} rows are left out: their human answer is empty, or does not "
            f"fit into `sequence_len: {cfg.sequence_len}` with its prompt"
        )
    return GivenPairs(source, lambda: pairs.with_format("arrow").iter(batch_size=BATCH_ROWS))


def pair_of_row(row: dict[str, Any], tokenize: Tokenize, special: set[int], sequence_len: int) -> dict[str, Any] | None:
    """Turns one row into a pair.

    Args:
        row: With `real`, `generated`, and `finish_reason` where a sample's is known.
        tokenize: Returns the prompt and last answer of messages; None where nothing in them is trained.
        special: The tokenizer's special tokens, one of which ends a turn.
        sequence_len: A generated answer is cut there, as one that the opponent draws.

    Returns:
        Ids of the prompt and both answers, and `finish_reason`; None where the human answer is empty or does not fit.

    Raises:
        ValueError: The row is not of the authors' format, or has an answer that cannot be tokenised.
    """
    uclaml.check_row(row)
    human = tokenize(row["real"])
    if human is None or len(human.prompt_ids) + len(human.chosen_ids) > sequence_len:
        return None
    end = [token for token in human.chosen_ids[-1:] if token in special]
    rejected = _generated(row, human, tokenize, end)
    reason = row.get("finish_reason") or "stop"
    if reason == "length" and end and rejected[-1:] == end:
        rejected = rejected[:-1]
    room = sequence_len - len(human.prompt_ids)
    if len(rejected) > room:
        rejected, reason = rejected[:room], "length"
    return {
        "prompt_ids": human.prompt_ids,
        "chosen_ids": human.chosen_ids,
        "rejected_ids": rejected,
        "finish_reason": reason,
    }


def _generated(row: dict[str, Any], human: Prompt, tokenize: Tokenize, end: list[int]) -> list[int]:
    generated = row.get("generated") or []
    if generated and generated[-1].get("role") != "assistant":
        raise ValueError(f"its `generated` does not end with an answer (role assistant): {generated!r}")
    if not generated or not generated[-1].get("content"):
        if not end:
            raise ValueError(
                "its `generated` is empty, and human answers have no end token of which an empty answer would consist: "
                "leave such rows out, or train the end of turns (`train_on_eos: turn`)"
            )
        return end
    answer = tokenize(generated)
    if answer is None or answer.prompt_ids != human.prompt_ids:
        raise ValueError(f"its `generated` has another prompt than its `real` once tokenised: {generated!r}")
    return answer.chosen_ids


def _load(source: str) -> Any:
    path = Path(source)
    kinds = {".parquet": "parquet", ".json": "json", ".jsonl": "json"}
    try:
        if path.is_file():
            kind = kinds.get(path.suffix)
            if kind is None:
                raise ValueError(f"a file needs one of the names {', '.join('*' + suffix for suffix in kinds)}")
            return load_dataset(kind, data_files=str(path), split="train")
        if (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists():
            saved = load_from_disk(str(path))
            return saved["train"] if isinstance(saved, DatasetDict) else saved
        return load_dataset(source, split="train")
    except Exception as error:  # the loaders of every format have errors of their own
        raise ValueError(
            f"`spin.initial_pairs: {source}` cannot be read as a file, a folder or a dataset on the hub: {error}"
        ) from error


def _tokenised(rows: Dataset, cfg: Any, tokenizer: Any) -> Dataset:
    """Tokenises the rows once; later starts, and other ranks, find the result in the cache of `datasets`."""
    entry = _template_entry(cfg)
    special, marks = special_tokens(tokenizer), turn_marks(cfg, tokenizer, declared_ends(cfg, tokenizer))
    sequence_len = int(cfg.sequence_len)
    strategy = uclaml.load(tokenizer, cfg, entry)

    def tokenize(messages: list[dict[str, Any]]) -> Prompt | None:
        row = strategy.tokenize_prompt({"real": messages})
        prompts = prompts_of_row(row["input_ids"], row["labels"], marks=marks)
        return prompts[-1] if prompts else None

    def convert(batch: dict[str, list], indices: list[int]) -> dict[str, list]:
        columns: dict[str, list] = {name: [] for name in _FEATURES}
        for position, index in enumerate(indices):
            row = {name: values[position] for name, values in batch.items()}
            try:
                pair = pair_of_row(row, tokenize, special, sequence_len)
            except ValueError as error:
                raise ValueError(f"row {index}: {error}") from None
            if pair is not None:
                for name, values in columns.items():
                    values.append(pair[name])
        return columns

    names = [name for name in ("real", "generated", "finish_reason") if name in rows.column_names]
    return map_rows(
        rows.select_columns(names),
        convert,
        code=[sys.modules[__name__], sys.modules[Prompt.__module__], sys.modules[answer_spans.__module__], uclaml],
        settings=[_content(tokenizer), strategy.prompter.chat_template, entry, sequence_len, cfg.eot_tokens, marks],
        features=Features(_FEATURES),
        desc="Tokenising spin.initial_pairs",
        batch_size=200,
    )


def _template_entry(cfg: Any) -> dict[str, Any]:
    """Returns what says how training data's messages become tokens: the entry of its first dataset with messages."""
    for dataset in cfg.datasets or []:
        kind = dataset.get("type")
        if isinstance(kind, str) and kind.partition(".")[0] in ("chat_template", "axolotl_spin"):
            return {key: dataset[key] for key in _TEMPLATE_KEYS if dataset.get(key) is not None}
    LOG.warning(
        "spin.initial_pairs: no dataset of `datasets:` has `type: chat_template`, so the prompts of iteration 0 follow "
        "`chat_template`, and later ones another format"
    )
    return {}


def _content(tokenizer: Any) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return backend.to_str() if backend is not None else repr(tokenizer)
