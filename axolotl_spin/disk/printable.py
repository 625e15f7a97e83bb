"""Texts that others wrote, on their way to a terminal: nothing in them moves the cursor, sets colours or turns the line."""

from __future__ import annotations

import unicodedata

# what a terminal acts on: control characters, halves of characters, and ends of lines that are not `\n`
_CATEGORIES = ("Cc", "Cs", "Zl", "Zp")
# these turn the direction in which the rest of a line is shown
_TURNS = frozenset("\u200e\u200f\u061c\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def printable(text: object) -> str:
    """Returns a text in which such characters are written out, as `\\x1b`; line ends and tabs stay.

    Args:
        text: Anything; its `str` is taken.
    """
    text = str(text)
    if text.isascii() and text.isprintable():
        return text
    return "".join(_shown(letter) for letter in text)


def _shown(letter: str) -> str:
    if letter in "\n\t":
        return letter
    acts = letter in _TURNS or unicodedata.category(letter) in _CATEGORIES
    return letter.encode("unicode_escape").decode("ascii") if acts else letter
