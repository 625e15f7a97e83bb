"""Reads the pairs of a run: lengths and margins of all answers, and a sample of prompts with every iteration's answer.

Files are read a row group at a time, so that memory does not grow with the texts; what is held of every answer is a few
numbers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from axolotl_spin.data.answers import distinct_2
from axolotl_spin.disk.atomic import MARK
from axolotl_spin.report.reading import RunData

# prompts in the page: spread evenly, and for each iteration the first and the last by each of the measures below
SPREAD, EXTREMES = 240, 6
# what reading a damaged file raises
_DAMAGE = (pa.ArrowException, OSError, UnicodeDecodeError)
# bytes of texts in the page, whatever their number; a text longer than the limit is cut
TEXT_BYTES, TEXT_CHARACTERS = 1_500_000, 4000
# answers whose word pairs are counted
_COUNTED = 1000


@dataclass
class IterationAnswers:
    """The answers that an iteration's opponent gave, one for each prompt that it was asked, in the order of the prompts.

    Attributes:
        run: Whose they are.
        iteration: The iteration.
        rows: (answers,) where each lies in the file.
        chosen_length, rejected_length: (answers,) tokens of the human's and of the opponent's.
        cut: (answers,) whether the opponent's was cut at its limit.
        chosen_logp, rejected_logp: (answers,) their log-probs under the opponent, sums in nats.
        distinct_2: Distinct pairs of neighbouring tokens over all such pairs, of the opponent's and of the human's
            answers, in the same sample; None where there are none.
    """

    run: RunData
    iteration: int
    rows: np.ndarray
    chosen_length: np.ndarray
    rejected_length: np.ndarray
    cut: np.ndarray
    chosen_logp: np.ndarray
    rejected_logp: np.ndarray
    distinct_2: tuple[float | None, float | None] = (None, None)

    @property
    def path(self) -> Path:
        return self.run.directory.pairs(self.iteration)

    @property
    def margin(self) -> np.ndarray:
        """(answers,) how much likelier per token the opponent finds the human's answer than its own, in nats."""
        chosen = self.chosen_logp / np.maximum(self.chosen_length, 1)
        return chosen - self.rejected_logp / np.maximum(self.rejected_length, 1)


@dataclass
class Sample:
    """Prompts with the human's answer and those of all iterations, as plain JSON for the page.

    Attributes:
        columns: Label, run and iteration of each column of answers.
        prompts: Each with `prompt`, `human`, ... and `answers`, one for each column, None where there is none.
        total: Prompts that the first run answers; where iterations answer different ones, of all iterations.
        cut_at: Characters after which a text is cut.
        pictures: Thumbnails as data URLs, by the hashes under a prompt's `images`; see `pictures.add_pictures`.
    """

    columns: list[dict[str, Any]] = field(default_factory=list)
    prompts: list[dict[str, Any]] = field(default_factory=list)
    total: int = 0
    cut_at: int = TEXT_CHARACTERS
    pictures: dict[str, str] = field(default_factory=dict)


def read_answers(run: RunData) -> list[IterationAnswers]:
    """Reads the figures of every iteration that has pairs; one that cannot be read is named in the run's notes."""
    found = []
    for entry in run.iterations:
        path = run.directory.pairs(entry.iteration)
        if not path.exists():
            continue
        try:
            mark = (pq.read_schema(path).metadata or {}).get(MARK, b"").decode()
            if mark != run.mark(entry.iteration):
                run.notes.append(f"{path} belongs to another run: left out.")
                continue
            found.append(_read(run, entry.iteration))
        except (pa.ArrowException, OSError, KeyError) as error:
            run.notes.append(f"{path} is damaged ({str(error).splitlines()[0]}): left out.")
    return found


def _read(run: RunData, iteration: int) -> IterationAnswers:
    names = ("chosen_ids", "rejected_ids", "finish_reason", "generated_in", "opponent_chosen_logp")
    parts: list[tuple[np.ndarray, ...]] = []
    counted: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    start = 0
    wanted = max(1, run.iterations[iteration].new_rows // _COUNTED)
    for batch in _batches(run.directory.pairs(iteration), [*names, "opponent_rejected_logp"]):
        own = pc.equal(batch["generated_in"], iteration)
        rows = start + np.flatnonzero(own.to_numpy(zero_copy_only=False))
        start += len(batch)
        batch = batch.filter(own)
        lengths = [pc.list_value_length(batch[name]).to_numpy(zero_copy_only=False) for name in names[:2]]
        cut = pc.not_equal(batch["finish_reason"], "stop").to_numpy(zero_copy_only=False)
        logps = [batch[f"opponent_{name}_logp"].to_numpy() for name in ("rejected", "chosen")]
        parts.append((rows, *lengths, cut, logps[1], logps[0]))
        few = np.arange(0, len(batch), wanted)
        for kept, name in zip(counted, ("rejected_ids", "chosen_ids"), strict=True):
            kept.extend(np.asarray(ids) for ids in batch[name].take(pa.array(few)).to_pylist())
    columns = [np.concatenate(column) for column in zip(*parts, strict=True)] if parts else [np.zeros(0)] * 6
    own_distinct, human_distinct = (distinct_2(kept) for kept in counted)
    return IterationAnswers(run, iteration, *columns, distinct_2=(own_distinct, human_distinct))


def _batches(path: Path, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    with pq.ParquetFile(path, page_checksum_verification=True, pre_buffer=False) as file:
        yield from file.iter_batches(8192, columns=list(columns))


def choose(answers: Sequence[IterationAnswers], spread: int = SPREAD) -> list[int]:
    """Picks prompts to show: spread evenly over all, and the extremes of each iteration, fewer of each from ten on.

    Args:
        answers: Of one run, to the same prompts.
        spread: How many are spread evenly.

    Returns:
        Indices among the prompts, in order.
    """
    total = max((len(found.rows) for found in answers), default=0)
    picked = set(np.linspace(0, max(total - 1, 0), min(spread, total)).round().astype(int).tolist())
    extremes = max(1, 10 * EXTREMES // max(10, len(answers)))
    for found in answers:
        for measure in (found.margin, found.rejected_length, found.rejected_length - found.chosen_length):
            for order in (np.argsort(measure, kind="stable"), np.argsort(-measure, kind="stable")):
                picked.update(order[:extremes].tolist())
    return sorted(picked)


def sample(runs: Sequence[list[IterationAnswers]]) -> Sample:
    """Lays prompts and all their answers side by side.

    Args:
        runs: Each run's answers, as `read_answers` gives them. Prompts are those of the first run that has any; the
            other runs' are found by prompt and human answer, as are those of a run whose iterations answer different ones.
    """
    with_answers = [found for found in runs if found]
    if not with_answers:
        return Sample()
    first = with_answers[0]
    same = first[0].run.same_prompts
    made, keys = Sample(), {}
    for asked in [first] if same else [[of_iteration] for of_iteration in first]:
        picked = choose(asked, SPREAD if same else SPREAD // len(first))
        texts = _texts(asked[0], picked, ("prompt", "chosen", "row", "images"))
        for index in picked:
            if index not in texts:
                continue
            known, number = texts[index], made.total + index
            if (key := _key(known)) in keys and not same:
                continue  # an iteration before answered it too
            keys[key] = number
            length = int(asked[0].chosen_length[index])
            made.prompts.append(
                {
                    "n": number,
                    "row": known["row"],
                    "prompt": known["prompt"],
                    "human": known["chosen"],
                    "tokens": length,
                    **({"images": known["images"]} if known.get("images") else {}),
                }
            )
        made.total += max(len(found.rows) for found in asked)
    for found in with_answers:
        where = {prompt["n"]: prompt["n"] for prompt in made.prompts} if found is first else _find(found[0], keys)
        for of_iteration in found:
            if not of_iteration.run.same_prompts:
                where = _find(of_iteration, keys)
            made.columns.append({"run": of_iteration.run.name, "iteration": of_iteration.iteration})
            own = _texts(of_iteration, sorted(where.values()), ("rejected",))
            for prompt in made.prompts:
                at = where.get(prompt["n"])
                prompt.setdefault("answers", []).append(
                    None if at is None or at not in own else _answer(of_iteration, at, own[at]["rejected"])
                )
    _fit(made)
    return made


def _answer(answers: IterationAnswers, index: int, text: str) -> dict[str, Any]:
    return {
        "text": text,
        "tokens": int(answers.rejected_length[index]),
        "cut": bool(answers.cut[index]),
        "margin": round(float(answers.margin[index]), 4),
        "human_logp": round(float(answers.chosen_logp[index]), 2),
        "logp": round(float(answers.rejected_logp[index]), 2),
    }


def _texts(answers: IterationAnswers, indices: Sequence[int], columns: Sequence[str]) -> dict[int, dict[str, Any]]:
    """Returns those columns of some answers that there are, by index; only the row groups that hold them are read.

    Damaged ones are left out and named in the run's notes.
    """
    indices = [index for index in indices if index < len(answers.rows)]
    rows = answers.rows[indices] if indices else np.zeros(0, dtype=np.int64)
    found: dict[int, dict[str, Any]] = {}
    with pq.ParquetFile(answers.path, page_checksum_verification=True, pre_buffer=False) as file:
        columns, start = [name for name in columns if name in file.schema_arrow.names], 0
        for group in range(file.num_row_groups):
            count = file.metadata.row_group(group).num_rows
            inside = np.flatnonzero((rows >= start) & (rows < start + count))
            if len(inside):
                try:
                    table = file.read_row_group(group, columns=columns).take(pa.array(rows[inside] - start))
                    found.update(zip((indices[i] for i in inside), table.to_pylist(), strict=True))
                except _DAMAGE as error:
                    _note(answers, error)
            start += count
    return found


def _note(answers: IterationAnswers, error: Exception) -> None:
    note = f"Texts in {answers.path} are damaged ({str(error).splitlines()[0]}): left out."
    if note not in answers.run.notes:
        answers.run.notes.append(note)


def _key(row: dict[str, Any]) -> bytes:
    text = f"{row['prompt']}\0{row['chosen']}"
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


def _find(answers: IterationAnswers, keys: dict[bytes, int]) -> dict[int, int]:
    """Returns where another run has the prompts of a sample: its index for each of the sample's."""
    found: dict[int, int] = {}
    index = 0
    try:
        for batch in _batches(answers.path, ["prompt", "chosen", "generated_in"]):
            batch = batch.filter(pc.equal(batch["generated_in"], answers.iteration))
            for row in batch.select(["prompt", "chosen"]).to_pylist():
                key = _key(row)
                if key in keys:
                    found.setdefault(keys[key], index)
                index += 1
    except _DAMAGE as error:
        _note(answers, error)
    return found


def _fit(made: Sample) -> None:
    """Cuts long texts, shorter and shorter, and at last leaves prompts out, until all are within the page's limit."""

    def size(limit: int) -> int:
        return sum(len(text[:limit].encode("utf-8", "surrogatepass")) for text in _all_texts(made))

    while size(made.cut_at) > TEXT_BYTES and made.cut_at > 250:
        made.cut_at //= 2
    while size(made.cut_at) > TEXT_BYTES and len(made.prompts) > 1:
        del made.prompts[1::2]
    for prompt in made.prompts:
        for holder, name in [(prompt, "prompt"), (prompt, "human"), *((a, "text") for a in prompt["answers"] if a)]:
            if len(holder[name]) > made.cut_at:
                holder[f"{name}_characters"] = len(holder[name])
                # of a prompt its end says most: the question that is answered
                holder[name] = holder[name][-made.cut_at :] if name == "prompt" else holder[name][: made.cut_at]


def _all_texts(made: Sample) -> Iterator[str]:
    for prompt in made.prompts:
        yield prompt["prompt"]
        yield prompt["human"]
        yield from (answer["text"] for answer in prompt["answers"] if answer)
