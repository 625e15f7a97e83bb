"""The opponent's answers: work cut into fixed chunks, and the protocol that a backend follows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

from axolotl_spin.generation.chunks import Chunk, Chunks


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn.

    Attributes:
        temperature: 0 is greedy decoding.
        top_p: Nucleus sampling; 1 is off.
        top_k: Sample among the k likeliest; None is off.
        stop_token_ids: Tokens that end an answer; the one drawn is kept as its last token.
    """

    temperature: float
    top_p: float
    top_k: int | None
    stop_token_ids: tuple[int, ...]


class Completion(NamedTuple):
    """An answer as drawn, never through text: token ids, and whether it ended by itself or was cut."""

    ids: list[int]
    finish_reason: Literal["stop", "length"]


Keep = Callable[[Chunk, list[Completion]], None]


class Backend(Protocol):
    """What answers prompts. Every rank calls it with the same chunks."""

    def answer(self, model: Any, chunks: Chunks, keep: Keep, iteration: int = 0) -> dict[str, float]:
        """Answers this rank's share of the chunks; over all ranks each chunk once.

        Args:
            model: The policy as the trainer wraps it, frozen for the call.
            chunks: What is to be answered.
            keep: Called with each chunk and its answers as they are done, in any order.
            iteration: Whose opponent the policy is.

        Returns:
            Seconds of the call's parts that are not answering, under their public names.
        """


def cut(ids: Sequence[int], limit: int, stop_token_ids: Sequence[int]) -> Completion:
    """Ends a drawn answer after its first stop token, or cuts it at its limit.

    What follows a stop token is padding. A cut answer gets no end token: it is the model's real sample.

    Args:
        ids: Drawn tokens, possibly with padding behind a stop token.
        limit: Most tokens the answer may have.
        stop_token_ids: Tokens that end an answer.
    """
    for position, token in enumerate(ids[:limit]):
        if token in stop_token_ids:
            return Completion(list(ids[: position + 1]), "stop")
    return Completion(list(ids[:limit]), "length")
