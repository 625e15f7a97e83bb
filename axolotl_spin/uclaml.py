"""Prompt strategy for the SPIN authors' published datasets: `type: axolotl_spin.uclaml`.

Their rows (for example `UCLA-AGI/SPIN_iter0`) hold two message lists, `real` (the conversation with the human answer)
and `generated` (the same prompt with a model's answer). `real` is tokenised by the host's own `chat_template` strategy.
`generated` may be empty or absent: this run's opponent answers anew.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel


def load(tokenizer: Any, cfg: Any, ds_cfg: Any = None, processor: Any = None) -> Any:
    """Returns the host's `chat_template` strategy, reading `real` (the host's entry point for a dataset `type`).

    Raises:
        ValueError: When a row's `real` is empty, does not end with an assistant's message, or does not have the
            prompt of its `generated`.
    """
    from axolotl.prompt_strategies.chat_template import load as load_chat_template
    from axolotl.utils.dict import DictDefault

    settings = DictDefault(ds_cfg.model_dump() if isinstance(ds_cfg, BaseModel) else dict(ds_cfg or {}))
    settings["field_messages"] = "real"
    if not settings["chat_template"] and cfg.chat_template:
        settings["chat_template"] = cfg.chat_template
        settings["chat_template_jinja"] = cfg.chat_template_jinja
    strategy = load_chat_template(tokenizer, cfg, settings, processor=processor)
    tokenize = strategy.tokenize_prompt

    def tokenize_checked(prompt: dict[str, Any]) -> Any:
        for row in _rows(prompt):
            check_row(row)
        return tokenize(prompt)

    strategy.tokenize_prompt = tokenize_checked
    return strategy


def check_row(row: dict[str, Any]) -> None:
    """Checks one row of the authors' format.

    Raises:
        ValueError: See `load`.
    """
    real, generated = row.get("real") or [], row.get("generated") or []
    if len(real) < 2 or real[-1].get("role") != "assistant":
        raise ValueError(
            "a row of a dataset with `type: axolotl_spin.uclaml` needs `real`: messages that end with the human "
            f"answer (role assistant); found {real!r}"
        )
    if generated and _texts(generated[:-1]) != _texts(real[:-1]):
        raise ValueError(
            "a row of a dataset with `type: axolotl_spin.uclaml` has a `generated` with another prompt than its "
            f"`real`: {generated[:-1]!r} instead of {real[:-1]!r}"
        )


def _texts(messages: list[dict[str, Any]]) -> list[tuple[Any, Any]]:
    return [(message.get("role"), message.get("content")) for message in messages]


def _rows(prompt: dict[str, Any]) -> list[dict[str, Any]]:
    """Splits the host's batch of rows (columns of lists) into rows; a single row comes back alone."""
    real = prompt.get("real")
    if not real or isinstance(real[0], dict):
        return [prompt]
    generated = prompt.get("generated") or [None] * len(real)
    return [{"real": r, "generated": g} for r, g in zip(real, generated, strict=True)]
