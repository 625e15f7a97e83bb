"""Answers that open with a think block, as the chat template marks one, and whether that alone tells two players apart."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from axolotl_spin.data.pairs import BATCH_ROWS

# the message's key for thoughts, where an entry of `datasets:` names none: the host's default
_THOUGHTS_KEY = "reasoning_content"
_REASONING, _CONTENT = "z 1 z", "y x y"
_MARK = re.compile(r"<[^<>\s]+>$|\[[^\[\]\s]+\]$")
# what models call the marks whose template does not show where thoughts go: Qwen and most others, Gemma 4, Magistral
_USUAL = (("<think>", "</think>"), ("<|channel>thought", "<channel|>"), ("[THINK]", "[/THINK]"))
# so much larger a share of own answers than of human ones opens with thoughts: the one is (nearly) the other by that alone
_APART = 0.5
# tokens at an answer's start that are looked at: the mark, and whether anything follows it
_START = 16


@dataclass(frozen=True)
class ThinkBlock:
    """What opens and ends thoughts.

    Attributes:
        opens, ends: Ids of the two marks.
        blanks: Tokens of white space, which may stand around them.
    """

    opens: tuple[int, ...]
    ends: tuple[int, ...]
    blanks: frozenset[int] = frozenset()

    def opened_by(self, ids: Sequence[int]) -> bool:
        """Whether an answer opens with a think block that has thoughts in it."""
        rest = self._strip(ids)
        if tuple(rest[: len(self.opens)]) != self.opens:
            return False
        rest = self._strip(rest[len(self.opens) :])
        return len(rest) > 0 and tuple(rest[: len(self.ends)]) != self.ends

    def share(self, answers: pa.ListArray | pa.ChunkedArray) -> float:
        """Returns the share of answers that open with thoughts; 0 where there are none. A piece at a time."""
        opened = 0
        for chunk in answers.chunks if isinstance(answers, pa.ChunkedArray) else [answers]:
            for start in range(0, len(chunk), BATCH_ROWS):
                starts = pc.list_slice(chunk.slice(start, BATCH_ROWS), 0, _START).to_pylist()
                opened += sum(self.opened_by(ids or ()) for ids in starts)
        return opened / max(len(answers), 1)

    def _strip(self, ids: Sequence[int]) -> Sequence[int]:
        start = next((place for place, token in enumerate(ids) if token not in self.blanks), len(ids))
        return ids[start:]


def think_block(cfg: Any, tokenizer: Any, blanks: Sequence[int] = ()) -> ThinkBlock | None:
    """Returns the marks of thoughts: those that a chat template of the data sets around them, else the usual ones.

    Args:
        cfg: The host's normalized config.
        tokenizer: The host's.
        blanks: Tokens of white space.

    Returns:
        None where neither the templates nor the tokenizer know any.
    """
    for entry in cfg.datasets or []:
        if marks := _shown(cfg, entry, tokenizer):
            break
    else:
        vocabulary = tokenizer.get_vocab()
        marks = next((usual for usual in _USUAL if usual[1] in vocabulary), None)
    if marks is None:
        return None
    opens, ends = (tuple(tokenizer(mark, add_special_tokens=False)["input_ids"]) for mark in marks)
    return ThinkBlock(opens, ends, frozenset(blanks))


def _shown(cfg: Any, entry: Any, tokenizer: Any) -> tuple[str, str] | None:
    """Returns what an entry's chat template sets around an assistant's thoughts; None where it shows none, or one mark for
    both."""
    from axolotl.utils.chat_templates import get_chat_template_from_config

    key = entry.get("template_thinking_key") or _THOUGHTS_KEY
    talk = [{"role": "user", "content": "x"}, {"role": "assistant", "content": _CONTENT, key: _REASONING}]
    try:
        template = get_chat_template_from_config(cfg=cfg, ds_cfg=entry, tokenizer=tokenizer)
        settings = dict(cfg.chat_template_kwargs or {})
        text = tokenizer.apply_chat_template(talk, tokenize=False, chat_template=template, **settings)
    except Exception:  # templates raise errors of their own, and a tokenizer may have no template
        return None
    before, found, rest = text.partition(_REASONING)
    between, content, _ = rest.partition(_CONTENT)
    opens, ends = _MARK.search(before.rstrip()), _MARK.search(between.strip())
    if not (found and content and opens and ends) or opens[0] == ends[0]:  # harmony's messages all open alike
        return None
    return opens[0], ends[0]


def told_apart(
    block: ThinkBlock | None, chosen: pa.ListArray | pa.ChunkedArray, rejected: pa.ListArray | pa.ChunkedArray
) -> str:
    """Returns a line where own answers open with thoughts and the human's do not; else nothing.

    Args:
        block: See `think_block`.
        chosen: Ids of human answers.
        rejected: Ids of the opponent's.
    """
    if block is None:
        return ""
    human, own = block.share(chosen), block.share(rejected)
    if own - human < _APART:
        return ""
    return (
        f"{own:.0%} of {len(rejected)} own answers open with thoughts, and {human:.0%} of the human's: they are told "
        "apart by that alone, so that the policy learns not to think, and little else. Give the human answers their "
        "thoughts (`field_thinking`), or use a chat template that opens answers without thoughts with an empty block"
    )
