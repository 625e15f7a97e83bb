"""The texts of answers, read behind their prompts: what a token says may depend on what stands before it.

Tokenizers with word marks drop the space of a text's first word, and a character may begin in the prompt's last token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

Decode = Callable[[list[list[int]]], list[str]]

# a character has at most four bytes, each a token; the rest is for the first token, whose space may be missing
_CONTEXT = 8


def answer_texts(prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], decode: Decode) -> list[str]:
    """Returns the text that each answer adds to its prompt's.

    Args:
        prompts: Ids of the prompts.
        answers: Ids of an answer to each.
        decode: Returns the texts of lists of ids.
    """
    contexts = [list(prompt[-_CONTEXT:]) for prompt in prompts]
    before = decode(contexts)
    whole = decode([[*context, *answer] for context, answer in zip(contexts, answers, strict=True)])
    return [text[_common(start, text) :] for start, text in zip(before, whole, strict=True)]


def _common(start: str, text: str) -> int:
    """Returns how many characters two texts begin with alike: all of `start`, unless its last one is only a part."""
    if text.startswith(start):
        return len(start)
    return next((place for place, pair in enumerate(zip(start, text, strict=False)) if pair[0] != pair[1]), len(text))
