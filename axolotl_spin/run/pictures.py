"""Rows with pictures before a model loads: the host's own collator makes tokens of them."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import transformers

from axolotl_spin.data import images
from axolotl_spin.data.images import ImageRows, labels_by_headers, tokenise_row
from axolotl_spin.data.media import placeholder_tokens
from axolotl_spin.data.row_cache import map_rows
from axolotl_spin.data.turns import Marks


def image_rows(
    cfg: Any,
    rows: Any,
    tokenizer: Any,
    processor: Any,
    marks: Marks,
    *,
    key: str = "datasets",
    first: int | None = None,
) -> ImageRows:
    """Makes tokens of the host's unprepared rows, once: later starts and other ranks find them in the cache.

    Args:
        cfg: The host's normalized config, with `processor_type`.
        rows: `datasets.Dataset` of conversations with pictures.
        tokenizer: The host's.
        processor: The host's.
        marks: By what turns are told apart, where the host's strategy does not.
        key: What the rows come from.
        first: How many rows are enough; None for all. A row gives one prompt.

    Raises:
        ValueError: A row cannot be used; names the key and the row.
    """
    from datasets import Features, List, Value

    rows = rows.select(range(min(len(rows), first or len(rows))))
    collate = host_collator(cfg, tokenizer, processor)
    strategy = collate.processing_strategy

    def known(ids: list[int]) -> list[int]:
        if not marks.headers:
            raise ValueError(
                "neither the host's processing strategy nor the chat template tells which tokens are an assistant's: give "
                "`role_boundaries:`"
            )
        return labels_by_headers(
            ids, [header.ids + header.blanks for header in marks.headers], marks.ends, marks.special
        )

    def convert(batch: dict[str, list], indices: list[int]) -> dict[str, list]:
        columns: dict[str, list] = {"input_ids": [], "labels": [], "images": []}
        for place, index in enumerate(indices):
            row = {name: values[place] for name, values in batch.items()}
            try:
                made = tokenise_row(row, collate, strategy, known)
            except (ValueError, KeyError, TypeError, OSError, IndexError) as error:
                raise ValueError(f"`{key}`: row {index} cannot be used: {error}") from error
            for name, values in columns.items():
                values.append(made[name])
        return columns

    settings = [
        *(cfg.processor_config, cfg.image_size, cfg.image_resize_algorithm, cfg.train_on_inputs, cfg.role_boundaries),
        *(strategy.chat_template, strategy.field_messages, strategy.roles_to_train, strategy.train_on_eos),
        *(processor.to_json_string(), tokenizer.name_or_path, len(tokenizer), marks, transformers.__version__),
    ]
    made = map_rows(
        rows,
        convert,
        code=[images, sys.modules[__name__]],
        settings=settings,
        features=Features(
            {"input_ids": List(Value("int32")), "labels": List(Value("int32")), "images": List(Value("string"))}
        ),
        desc="Processing rows with pictures",
        batch_size=8,  # whose pictures are in memory at once
    )
    return ImageRows(rows, made, collate, placeholder_tokens(cfg))


def host_collator(cfg: Any, tokenizer: Any, processor: Any) -> Any:
    """Returns the collator that the host's builder makes for SFT on pictures.

    Contract test: test_host_contract.py::test_the_collator_of_rows_with_pictures.

    Args:
        cfg: The host's normalized config, with `processor_type`.
        tokenizer: The host's.
        processor: The host's.
    """
    from axolotl.core.builders.causal import HFCausalTrainerBuilder
    from axolotl.utils.chat_templates import get_chat_template_from_config

    template = get_chat_template_from_config(cfg=cfg, tokenizer=tokenizer) if cfg.chat_template else None
    arguments = SimpleNamespace(
        pretraining=False,
        sample_packing=False,
        eval_sample_packing=False,
        chat_template=template,
        image_size=cfg.image_size or None,
        image_resize_algorithm=cfg.image_resize_algorithm or None,
    )
    return HFCausalTrainerBuilder(cfg, None, tokenizer, processor).build_collator(arguments, padding=True)


def refuse_unfit(prompts: Any, found: ImageRows, key: str, *, sequence_len: int, sharded: bool) -> None:
    """Refuses prompts that leave no room for an answer, pictures that are no part of a prompt, and rows without.

    Args:
        prompts: `datasets.Dataset` with `prompt_ids`, `chosen_ids` and `row`.
        found: The rows that they come from.
        key: What these come from.
        sequence_len: The host's.
        sharded: Whether ranks gather weights for each forward, a picture's tower among them.

    Raises:
        ValueError: Names the row and the key.
    """
    marks = set(found.placeholders)
    for prompt in prompts:
        whole, length = found.tokenised[prompt["row"]], len(prompt["prompt_ids"])
        why = ""
        if length >= sequence_len:
            why = (
                f"its prompt has {length} tokens, its pictures' included, and `sequence_len: {sequence_len}` leaves no "
                "room for an answer: raise it, or make pictures smaller (`image_size`)"
            )
        elif any(token in marks for token in whole["input_ids"][length:]):
            why = (
                "it has a picture in or behind its last answer, and pairs have pictures in their prompts alone: leave out "
                "what follows the answer"
            )
        elif sharded and not whole["images"]:
            why = (
                "it has no picture: ranks that share weights (ZeRO-3, FSDP2) gather a vision tower's together, and would "
                "wait forever for one that needs none; leave such rows out, or train without sharding"
            )
        if why:
            raise ValueError(f"`{key}`: row {prompt['row']} cannot be used: {why}")
