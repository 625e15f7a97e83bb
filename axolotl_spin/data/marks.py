"""Where the marks between turns come from: the tokenizer, the model's generation config, the chat templates of the data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from axolotl_spin.data.turns import Header, Marks, common_start, last_header

_WHITE = ("\n", "\n\n", " ", "  ", "\t", " \n", "\r\n")
# the host's, where an entry of `datasets:` has none
_ROLES = {"human": "user", "gpt": "assistant"}
# other turns whose headers are looked for, and whether behind an answer or at the start. Not a tool's: its words may stand
# within an assistant's turn, and then no header follows
_OTHERS = (("user", True), ("user", False), ("system", False))

Turns = list[dict[str, str]]
Render = Callable[..., list[int]]


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
    blanks = {token for text in _WHITE for token in encode(text)}
    parts = _key(entries, "message_field_training_detail")
    others = _key(entries, "message_field_training") or _several_roles(entries)
    headers, openings = set[Header](), set[Header]()
    for render in [_renderer(cfg, entry, tokenizer) for entry in entries]:
        headers.update(filter(None, [_header(render, blanks)]))
        if parts or others:
            openings.update(filter(None, (_opening(render, role, later, ends, blanks) for role, later in _OTHERS)))
    special = special_tokens(tokenizer)
    return Marks(
        ends=tuple(sorted(ends & special)),
        claimed=tuple(sorted((ends - _models_ends(cfg, tokenizer)) & special)),
        special=tuple(sorted({token for header in headers for token in header.ids} & special)),
        blanks=tuple(sorted(blanks)),
        headers=tuple(sorted(headers, key=lambda header: header.ids)),
        parts=parts,
        others=others,
        openings=tuple(sorted(openings, key=lambda header: header.ids)),
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


def _renderer(cfg: Any, entry: Any, tokenizer: Any) -> Render:
    """Returns what makes tokens of a conversation by an entry's chat template; it raises whatever that raises."""
    from axolotl.utils.chat_templates import get_chat_template_from_config

    def render(turns: Turns, generation: bool = False) -> list[int]:
        template = get_chat_template_from_config(cfg=cfg, ds_cfg=entry, tokenizer=tokenizer)
        settings = {**(cfg.chat_template_kwargs or {}), "return_dict": False}
        return list(
            tokenizer.apply_chat_template(
                turns, tokenize=True, add_generation_prompt=generation, chat_template=template, **settings
            )
        )

    return render


def _header(render: Render, blanks: set[int]) -> Header | None:
    """Returns what a chat template sets before an assistant's content; None where it cannot be told."""
    try:
        asked, prompt = render(_talk("x")), render(_talk("x"), True)
        other = render(_talk("z 1"), True)
        twice = render(_talk("x", "y", "z 1", "y x"))
        answers = [render(_talk("x", content)) for content in ("y", "z 1")]
    except Exception:  # templates raise errors of their own, and a tokenizer may have no template
        return None
    own = len(prompt) - len(asked) if prompt[: len(asked)] == asked else 0
    if not own:  # the header is what ends the user's turn
        _, own = _around(prompt, other)
    header = tuple(prompt[len(prompt) - own :])
    while header and _count(header, twice) != 2:  # its last tokens may merge with the content
        header = header[:-1]
    stripped = _without_blanks(header, blanks)
    if not stripped or _count(stripped, twice) != 2:
        return None
    found = Header(stripped, header[len(stripped) :])
    before, _ = _around(*answers)
    opened = last_header(answers[0], before, [found])
    return replace(found, block=tuple(answers[0][opened[1] : before])) if opened else found


def _opening(render: Render, role: str, later: bool, ends: set[int], blanks: set[int]) -> Header | None:
    """Returns what a chat template sets before another role's content, behind an answer or at the start.

    None where it cannot be told.
    """

    def said(content: str, answer: str = "y") -> list[int]:
        turn = {"role": role, "content": content}
        if later:
            return render([*_talk("x", answer), turn])
        return render([turn, *_talk("x", answer)[role == "user" :]])

    try:
        one, other, behind = said("z 1"), said("x"), said("z 1", "y x")
    except Exception:  # see `_header`; some know fewer roles
        return None
    start = len(one) - _around(one, behind)[1] if later else 0
    header = tuple(one[start : _around(one, other)[0]])
    last = max((place for place, token in enumerate(header) if token in ends), default=-1)
    header = header[last + 1 :]  # the answer before it has an end
    while header and header[0] in blanks:
        header = header[1:]
    stripped = _without_blanks(header, blanks)
    return Header(stripped, header[len(stripped) :]) if stripped else None


def _without_blanks(header: tuple[int, ...], blanks: set[int]) -> tuple[int, ...]:
    while header and header[-1] in blanks:
        header = header[:-1]
    return header


def _talk(*contents: str) -> Turns:
    return [{"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(contents)]


def _around(one: list[int], other: list[int]) -> tuple[int, int]:
    """Returns how many tokens two conversations that differ in one content share before it, and behind it."""
    before, behind, size = common_start(one, other), _common_end(one, other), min(len(one), len(other))
    return min(before, size - behind), min(behind, size - before)  # where contents begin or end alike


def _common_end(one: list[int], other: list[int]) -> int:
    return common_start(one[::-1], other[::-1])


def _count(part: tuple[int, ...], ids: list[int]) -> int:
    return sum(tuple(ids[at : at + len(part)]) == part for at in range(len(ids) - len(part) + 1))
