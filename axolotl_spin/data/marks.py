"""Where the marks between turns come from: the tokenizer, the model's generation config, the chat templates of the data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from axolotl_spin.data.turns import Header, Marks

_WHITE = ("\n", "\n\n", " ", "  ", "\t", " \n", "\r\n")
# the host's, where an entry of `datasets:` has none
_ROLES = {"human": "user", "gpt": "assistant"}

Turns = list[dict[str, str]]
Encode = Callable[[str], list[int]]


def special_tokens(tokenizer: Any) -> set[int]:
    """Returns the tokens that no ordinary text gives: the tokenizer's special and added ones."""
    added = tokenizer.added_tokens_decoder
    # mistral-common's has a method of this name, which it does not implement; all of its special tokens are in the other
    return {*tokenizer.all_special_ids, *(() if callable(added) else added)}


def declared_ends(cfg: Any, tokenizer: Any) -> set[int]:
    """Returns the tokens that are said to end an answer: by the tokenizer, `eot_tokens` and the model's generation config.

    Args:
        cfg: The host's normalized config.
        tokenizer: The host's.
    """
    named = tokenizer.convert_tokens_to_ids(list(cfg.eot_tokens or ()))
    return {*_models_ends(cfg, tokenizer), *(token for token in named if token is not None)}


def _models_ends(cfg: Any, tokenizer: Any) -> set[int]:
    """Returns the tokens that end an answer by the tokenizer and the model's generation config."""
    from axolotl.loaders.utils import load_model_config
    from transformers import GenerationConfig

    try:
        settings = GenerationConfig.from_pretrained(cfg.base_model, revision=cfg.revision_of_model or "main")
    except (OSError, ValueError):  # the model has none; the one made from its config is what it gets
        settings = GenerationConfig.from_model_config(load_model_config(cfg))
    return {*end_ids(settings), *end_ids(tokenizer)}


def end_ids(generation_config: Any) -> set[int]:
    """Returns the end tokens of a generation config, which has none, one or several, or of a tokenizer."""
    found = getattr(generation_config, "eos_token_id", None)
    return {int(token) for token in (found if isinstance(found, (list, tuple)) else [found]) if token is not None}


def turn_marks(cfg: Any, tokenizer: Any, ends: set[int]) -> Marks:
    """Collects by what the turns of prepared rows are told apart.

    Args:
        cfg: The host's normalized config.
        tokenizer: The host's.
        ends: See `declared_ends`.
    """

    def encode(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    entries = [entry for entry in [*(cfg.datasets or []), *(cfg.test_datasets or [])] if _has_turns(entry)]
    blanks = tuple(sorted({token for text in _WHITE for token in encode(text)}))
    headers = {header for entry in entries if (header := _header(cfg, entry, tokenizer, set(blanks)))}
    special = special_tokens(tokenizer)
    return Marks(
        ends=tuple(sorted(ends & special)),
        claimed=tuple(sorted((ends - _models_ends(cfg, tokenizer)) & special)),
        special=tuple(sorted({token for header in headers for token in header.ids} & special)),
        blanks=blanks,
        headers=tuple(sorted(headers, key=lambda header: header.ids)),
        parts=_key(entries, "message_field_training_detail"),
        others=_key(entries, "message_field_training") or _several_roles(entries),
    )


def _has_turns(entry: Any) -> bool:
    kind = entry.get("type")
    return kind is None or (isinstance(kind, str) and kind.partition(".")[0] in ("chat_template", "axolotl_spin"))


def _key(entries: list[Any], name: str) -> str | None:
    return next((f"{name}: {entry[name]}" for entry in entries if entry.get(name)), None)


def _several_roles(entries: list[Any]) -> str | None:
    for entry in entries:
        named = {source: role for role, sources in (entry.get("roles") or {}).items() for source in sources}
        trained = {(named or _ROLES).get(role, role) for role in entry.get("roles_to_train") or ()}
        if len(trained) > 1:
            return f"roles_to_train: [{', '.join(entry['roles_to_train'])}]"
    return None


def _header(cfg: Any, entry: Any, tokenizer: Any, blanks: set[int]) -> Header | None:
    """Returns what an entry's chat template sets before an assistant's content; None where it cannot be told."""
    from axolotl.utils.chat_templates import get_chat_template_from_config

    def ids(turns: Turns, generation: bool = False) -> list[int]:
        settings = {**(cfg.chat_template_kwargs or {}), "return_dict": False}
        return list(
            tokenizer.apply_chat_template(
                turns, tokenize=True, add_generation_prompt=generation, chat_template=template, **settings
            )
        )

    try:
        template = get_chat_template_from_config(cfg=cfg, ds_cfg=entry, tokenizer=tokenizer)
        asked, prompt = ids(_talk("x")), ids(_talk("x"), generation=True)
        other = ids(_talk("z 1"), generation=True)
        twice = ids(_talk("x", "y", "z 1", "y x"))
    except Exception:  # templates raise errors of their own, and a tokenizer may have no template
        return None
    own = len(prompt) - len(asked) if prompt[: len(asked)] == asked else 0
    if not own:  # the header is what ends the user's turn
        own = _common_end(prompt, other)
    header = tuple(prompt[len(prompt) - own :])
    while header and _count(header, twice) != 2:  # its last tokens may merge with the content
        header = header[:-1]
    stripped = header
    while stripped and stripped[-1] in blanks:
        stripped = stripped[:-1]
    if not stripped or _count(stripped, twice) != 2:
        return None
    return Header(stripped, header[len(stripped) :])


def _talk(*contents: str) -> Turns:
    return [{"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(contents)]


def _common_end(one: list[int], other: list[int]) -> int:
    pairs = zip(reversed(one), reversed(other), strict=False)
    return next((count for count, (left, right) in enumerate(pairs) if left != right), min(len(one), len(other)))


def _count(part: tuple[int, ...], ids: list[int]) -> int:
    return sum(tuple(ids[at : at + len(part)]) == part for at in range(len(ids) - len(part) + 1))
