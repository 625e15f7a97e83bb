"""Which of a row's labels are an assistant's turn: SFT labels tokens, a pair needs whole turns.

The host labels contents and ends by themselves. So a run of labels may be a turn, a part of one (`train_detail`), several
turns without a mark between them, or no more than the end of somebody else's turn (`train_on_eos: all`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

IGNORED = -100  # the label of tokens that SFT does not train (torch.nn.CrossEntropyLoss)

# so many tokens may stand between a turn and the end that the host labels as its own
TO_END = 3

_ASSISTANT_ALONE = "train the assistant's alone (`roles_to_train: [assistant]`, no `message_field_training`)"

Span = tuple[int, int]  # start, and end exclusive


class UnclearTurnsError(ValueError):
    """The tokens do not tell which labels belong to one turn; the message names the key."""


@dataclass(frozen=True)
class Header:
    """What a chat template sets before a turn's content.

    Attributes:
        ids: Its tokens, up to the blank ones at its end, which may merge with the content.
        blanks: Those.
        block: What stands behind them in a conversation's last answer, whatever that says: an empty think block, say.
    """

    ids: tuple[int, ...]
    blanks: tuple[int, ...] = ()
    block: tuple[int, ...] = ()


@dataclass(frozen=True)
class Marks:
    """By what the turns of a row are told apart.

    Attributes:
        ends: Tokens that end an answer.
        special: Other tokens that stand between turns: the special ones of the headers.
        blanks: Tokens of white space.
        headers: Of an assistant's turns, by the chat templates of all datasets.
        claimed: Those of `ends` that `eot_tokens` alone names. One may close a message within a turn, as
            harmony's `<|end|>` closes thoughts.
        parts: The key by which a turn may have labels in parts, or None.
        others: The key by which turns of other roles may have labels too, or None.
        openings: Headers of other roles' turns, as far as they are known; none without `parts` and `others`.
    """

    ends: tuple[int, ...] = ()
    special: tuple[int, ...] = ()
    blanks: tuple[int, ...] = ()
    headers: tuple[Header, ...] = ()
    claimed: tuple[int, ...] = ()
    parts: str | None = None
    others: str | None = None
    openings: tuple[Header, ...] = ()


NO_MARKS = Marks()  # each run of labels is a turn


def labelled_spans(labels: Sequence[int]) -> list[Span]:
    """Returns the runs of labelled tokens as (start, end) with `end` exclusive, in order."""
    spans: list[Span] = []
    start: int | None = None
    for position, label in enumerate(labels):
        if label != IGNORED and start is None:
            start = position
        elif label == IGNORED and start is not None:
            spans.append((start, position))
            start = None
    if start is not None:
        spans.append((start, len(labels)))
    return spans


def answer_spans(ids: Sequence[int], labels: Sequence[int], marks: Marks) -> list[Span]:
    """Returns the trained assistant turns of a row, whole, each up to its end token where that is labelled.

    Args:
        ids: The row's tokens.
        labels: As many labels.
        marks: By what turns are told apart.

    Raises:
        UnclearTurnsError: What is labelled may be parts of one turn, or another role's, and the tokens do not tell.
    """
    marks = _marks_of_row(ids, marks)
    ends, answers = set(marks.ends), list[Span]()
    runs = _at_ends(ids, labelled_spans(labels), marks)
    if not (marks.headers or marks.parts or marks.others) and len(runs) == 1:
        return runs  # it may say nothing but its end
    for start, end in runs:
        before = answers[-1] if answers else None
        if all(token in ends for token in ids[start:end]):
            # behind an answer without one it is that answer's end; else the end of a turn that is not trained
            if before and _continues(ids, before, start, marks, TO_END):
                answers[-1] = (before[0], start + 1)
        elif before and _continues(ids, before, start, marks):
            answers[-1] = (before[0], end)
        elif marks.others is None or _is_answer(ids, start, marks):
            answers.append((_opening(ids, start, marks), end))
    return [_whole(ids, answer, marks) for answer in answers] if marks.parts else answers


def _marks_of_row(ids: Sequence[int], marks: Marks) -> Marks:
    """Leaves out what keys say of a chat template's turns where a row has none of these."""
    if not marks.headers or not (marks.parts or marks.others):
        return marks
    known = last_header(ids, len(ids), marks.headers + marks.openings)
    return marks if known is not None else replace(marks, parts=None, others=None)


def _at_ends(ids: Sequence[int], runs: list[Span], marks: Marks) -> list[Span]:
    """Cuts runs behind each end token, and drops the white space that a template sets there."""
    cut, ends, blanks = [], set(marks.ends), set(marks.blanks)
    for start, stop in runs:
        at = start
        for position in range(start, stop):
            if ids[position] in ends and not _goes_on(ids, position, stop, marks):
                cut.append((at, position + 1))
                at = position + 1
        if at < stop and (at == start or any(token not in blanks for token in ids[at:stop])):
            cut.append((at, stop))
    return cut


def _goes_on(ids: Sequence[int], place: int, stop: int, marks: Marks) -> bool:
    """Whether a run's turn goes on behind an end that `eot_tokens` alone names: with a header that is trained too, which
    the host does only within a message, and up to another end than this."""
    if ids[place] not in marks.claimed:
        return False
    behind = [at for at in range(place + 1, stop) if ids[at] not in marks.blanks]
    if not behind or ids[behind[-1]] == ids[place]:
        return False
    rest = tuple(ids[behind[0] : stop])
    return any(rest[: len(header.ids)] == header.ids for header in marks.headers)


def _continues(ids: Sequence[int], before: Span, start: int, marks: Marks, near: int | None = None) -> bool:
    """Whether labels belong to the turn whose labels end before them.

    Args:
        ids: The row's.
        before: The turn so far.
        start: Where the labels in question begin.
        marks: By what turns are told apart.
        near: What is so many tokens behind it, or fewer, needs no header to be of the turn.
    """
    if ids[before[1] - 1] in marks.ends or any(token in _closing(marks) for token in ids[before[1] : start]):
        return False
    opened = last_header(ids, start, marks.headers + marks.openings)
    if opened is not None:
        return opened[1] <= before[0]
    if near is not None and start - before[1] <= near:
        return True
    if marks.parts:
        raise UnclearTurnsError(
            f"`{marks.parts}` trains parts of turns, and neither an end token nor a chat template's header tells where a "
            f"turn ends: remove `{marks.parts}`, or name the template's end of turn in `eot_tokens`"
        )
    return False


def _closing(marks: Marks) -> set[int]:
    return {*marks.ends, *marks.special}


def _is_answer(ids: Sequence[int], start: int, marks: Marks) -> bool:
    """Whether the header of an assistant, or of another role, has opened the turn of a labelled token."""
    if not marks.headers:
        raise UnclearTurnsError(
            f"`{marks.others}` trains turns of several roles, and the chat template does not tell an assistant's from the "
            f"others: {_ASSISTANT_ALONE}"
        )
    own, others = (last_header(ids, start, headers) for headers in (marks.headers, marks.openings))
    opened = max(filter(None, (own, others)), default=None)
    if opened is None or own == others or any(token in _closing(marks) for token in ids[opened[1] : start]):
        # behind a tool's words, say, which some templates set into the assistant's turn
        raise UnclearTurnsError(
            f"`{marks.others}` trains turns of several roles, and what the chat template sets before token {start} does "
            f"not tell whose turn is trained there: {_ASSISTANT_ALONE}"
        )
    return opened == own


def _opening(ids: Sequence[int], start: int, marks: Marks) -> int:
    """Returns where the turn of a labelled token starts, where its first part may have no labels."""
    if not marks.parts:
        return start
    opened = last_header(ids, start, marks.headers)
    if opened is None or any(token in _closing(marks) for token in ids[opened[1] : start]):
        raise UnclearTurnsError(
            f"`{marks.parts}` trains parts of turns, and the chat template's header of an assistant's turn is not found "
            f"before the labels, so where that turn starts is not known: remove `{marks.parts}`"
        )
    unlabelled = ids[opened[1] : start]
    return opened[1] + max(common_start(header.block, unlabelled) for header in marks.headers)


def common_start(one: Sequence[int], other: Sequence[int]) -> int:
    """Returns with how many tokens two sequences begin alike."""
    pairs = zip(one, other, strict=False)
    return next((count for count, (left, right) in enumerate(pairs) if left != right), min(len(one), len(other)))


def _whole(ids: Sequence[int], answer: Span, marks: Marks) -> Span:
    """Returns an answer with what of its turn stands unlabelled behind it; an end token that is not trained stays out."""
    start, end = answer
    if ids[end - 1] in marks.ends:
        return answer
    closing = _closing(marks)
    stop = next((place for place in range(end, len(ids)) if ids[place] in closing), len(ids))
    following = last_header(ids, len(ids), marks.headers + marks.openings)
    if stop == len(ids) and following is not None and following[1] > end:
        raise UnclearTurnsError(
            f"`{marks.parts}` trains parts of turns, and no end token tells where a turn ends: remove `{marks.parts}`, or "
            "name the template's end of turn in `eot_tokens`"
        )
    while stop > end and ids[stop - 1] in marks.blanks:
        stop -= 1
    return start, stop


def last_header(ids: Sequence[int], stop: int, headers: Sequence[Header]) -> Span | None:
    """Returns the last header that ends at `stop` or before, from its first token to where the content starts."""
    found: Span | None = None
    for header in headers:
        size = len(header.ids)
        for at in range(stop - size, -1, -1):
            if tuple(ids[at : at + size]) == header.ids:
                behind = at + size + len(header.blanks)
                content = behind if tuple(ids[at + size : behind]) == header.blanks and behind <= stop else at + size
                found = max(found or (at, content), (at, content))
                break
    return found
