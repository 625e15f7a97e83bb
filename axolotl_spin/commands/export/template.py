"""A chat template read backwards: from the tokens of a pair to the messages that give these very tokens.

Pairs are tokens. Formats made of messages need the conversation back: it is read from the decoded text by the marks that
the template sets between turns, and taken only if the template makes exactly the pair's tokens of it again.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from axolotl_spin.data.texts import answer_texts

Message = dict[str, str]


def message(role: str, content: str) -> Message:
    """Returns a message as chat templates take it."""
    return {"role": role, "content": content}


@dataclass(frozen=True)
class Answered:
    """A prompt with one answer, as tokens.

    Attributes:
        prompt_ids: The prompt's.
        answer_ids: The answer's.
        cut: Whether the answer was cut, so that it has no end.
        turns: The prompt's messages, where they are known.
        closed: Whether an answer that was not cut must end as the template ends a turn; False where ends are not trained.
    """

    prompt_ids: Sequence[int]
    answer_ids: Sequence[int]
    cut: bool = False
    turns: Sequence[Message] | None = None
    closed: bool = False


class TemplateReader:
    """Reads conversations out of what a tokenizer's chat template has made.

    Args:
        tokenizer: With its `chat_template`.

    Raises:
        ValueError: There is no chat template, or its turns cannot be told apart.
    """

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError(
                "the tokenizer has no chat template, so prompts cannot be read as messages: --format parquet keeps tokens"
            )
        turns = [message(role, f"x{index}x") for index, role in enumerate(["user", "assistant"] * 2 + ["user"])]
        # what stands before, between and behind the contents
        self._begin, self._to_answer, self._to_user, *_, self._generation = self._around(turns, generation=True)
        self._end = self._around(turns[:2])[-1]
        try:
            self._begin_system, self._after_system, _ = self._around([message("system", "xsx"), turns[0]])
        except Exception:  # templates raise errors of their own for roles that they do not take
            self._begin_system = self._after_system = ""
        if not all(mark.strip() for mark in (self._to_answer, self._to_user, self._generation, self._end)):
            raise ValueError("the chat template sets no marks between turns, so prompts cannot be read as messages")

    def read(self, pairs: Sequence[Answered]) -> list[list[Message] | None]:
        """Returns for each pair the messages, the answer as the last, that the template turns into its tokens.

        None stands for a pair that no messages were found for: text that is tokenised in another way, an answer with an end
        of another kind, or a prompt that another template has made.

        Args:
            pairs: Prompts with an answer.
        """
        candidates = [self._candidates(pair) for pair in pairs]
        found: list[list[Message] | None] = [None] * len(pairs)
        left = list(range(len(pairs)))
        while left:
            tried = [(index, turns) for index in left if (turns := next(candidates[index], None)) is not None]
            rendered = [(index, turns, text) for index, turns in tried if (text := self._try_render(turns)) is not None]
            for (index, turns, _), ids in zip(rendered, self.encode([text for *_, text in rendered]), strict=True):
                if self._is(ids, pairs[index]):
                    found[index] = turns
            left = [index for index, _ in tried if found[index] is None]
        return found

    def literal(self, pair: Answered) -> str:
        """Returns an answer's content as it reads, whether or not that gives its tokens again."""
        return self._contents(self.decode(pair.answer_ids), pair.cut)[0]

    def closed(self, answer_ids: Sequence[int]) -> bool:
        """Whether an answer ends as the template ends a turn."""
        return self.decode(answer_ids).rstrip().endswith(self._end.strip())

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Returns the tokens of texts, adding none."""
        return self._tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of tokens, special ones included."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def _around(self, turns: list[Message], generation: bool = False) -> list[str]:
        text, parts = self._render(turns, generation), []
        for turn in turns:
            before, found, text = text.partition(turn["content"])
            if not found:
                raise ValueError("the chat template leaves out or changes what is said in a turn")
            parts.append(before)
        return [*parts, text]

    def _render(self, turns: list[Message], generation: bool = False) -> str:
        return self._tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=generation)

    def _try_render(self, turns: list[Message]) -> str | None:
        try:
            return self._render(turns)
        except Exception:  # a template may refuse what was read wrongly, by errors of its own
            return None

    def _is(self, ids: list[int], pair: Answered) -> bool:
        """Whether tokens are a pair's, with nothing behind them but what the template ends a turn with."""
        wanted = [*pair.prompt_ids, *pair.answer_ids]
        ended = self.closed(pair.answer_ids)
        if ended if pair.cut else pair.closed and not ended:
            return False
        rest = self.decode(ids[len(wanted) :]).strip()
        return list(ids[: len(wanted)]) == wanted and rest == ("" if ended else self._end.strip())

    def _candidates(self, pair: Answered) -> Iterator[list[Message]]:
        """Yields conversations that a pair may be, the most literal one first."""
        if pair.turns is not None:
            prompts = [list(pair.turns)]
        else:
            text = self.decode(pair.prompt_ids)
            # some tokenizers do not give the template's whitespace back
            read = (self._conversation(text, loose) for loose in (False, True))
            prompts = [turns for turns in read if turns is not None]
        for turns in prompts:
            for content in self._possible_contents(pair):
                yield [*turns, message("assistant", content)]

    def _possible_contents(self, pair: Answered) -> list[str]:
        """Returns what an answer may say, read by itself and behind its prompt, which may say a space more."""
        behind = answer_texts([pair.prompt_ids], [pair.answer_ids], lambda lists: [self.decode(ids) for ids in lists])
        read = [self._contents(text, pair.cut) for text in (self.decode(pair.answer_ids), behind[0])]
        return list(dict.fromkeys(content for contents in read for content in contents))

    def _contents(self, answer: str, cut: bool) -> list[str]:
        """Returns what an answer's message may say, the most literal first."""
        if cut:
            return list(dict.fromkeys([answer, answer.strip()]))
        ends = (self._end, self._end.rstrip(), self._end.strip())
        read = [answer.removesuffix(end) for end in ends if answer.endswith(end)] or [answer]
        return list(dict.fromkeys([*read, read[-1].strip()]))

    def _conversation(self, text: str, loose: bool) -> list[Message] | None:
        """Reads a prompt's turns; None where they are not the template's."""

        def pattern(mark: str) -> str:
            return r"\s*" + r"\s*".join(map(re.escape, mark.split())) + r"\s*" if loose else re.escape(mark)

        behind = re.search(pattern(self._generation) + r"\Z", text)
        if behind is None:
            return None
        body, turns = text[: behind.start()], []
        system = f"{pattern(self._begin_system)}(.*?){pattern(self._after_system)}" if self._begin_system else r"(?!)"
        start = re.match(pattern(self._begin), body)  # first: some templates begin with a system message of their own
        if start is None:
            start = re.match(system, body, re.DOTALL)
            if start is None:
                return None
            turns.append(message("system", start[1]))
        body = body[start.end() :]
        while (end := re.search(pattern(self._to_answer), body)) is not None:
            turns.append(message("user", body[: end.start()]))
            body = body[end.end() :]
            end = re.search(pattern(self._to_user), body)
            if end is None:
                return None
            turns.append(message("assistant", body[: end.start()]))
            body = body[end.end() :]
        return [*turns, message("user", body)]
