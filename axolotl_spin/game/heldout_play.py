"""Held-out play: the policy answers prompts that it is not trained on, and is asked to tell its answers from the human's.

At the game's end the model's distribution is the data's, so its own answers and the human's have the same distribution,
and so has their log-prob per token: the AUC between the two is 0.5 and the mean margin 0. Nothing here touches training:
the policy is frozen, the answers have seeds of their own, global random state stays as it is.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from accelerate.utils import gather_object
from axolotl.utils.logging import get_logger

from axolotl_spin.data.answers import distinct_2
from axolotl_spin.data.endings import end_alike
from axolotl_spin.data.pairs import PairDataset
from axolotl_spin.data.texts import answer_texts
from axolotl_spin.disk.atomic import MARK, write_whole
from axolotl_spin.game.head_to_head import head_to_head, play_before
from axolotl_spin.generation.backend import Completion, Sampling
from axolotl_spin.generation.chunks import Chunk, Chunks, chunk_rows, iteration_seed
from axolotl_spin.generation.transformers import TransformersBackend
from axolotl_spin.monitor.metrics import HELD_OUT, START
from axolotl_spin.monitor.trackers import send_samples
from axolotl_spin.ranks.main import Ranks
from axolotl_spin.run.plan import IterationPlan
from axolotl_spin.run.prepare import SpinRun
from axolotl_spin.run.selected import mark_of, spread_of_play
from axolotl_spin.training.policy import frozen
from axolotl_spin.training.scoring import Scorer

LOG = get_logger(__name__)

_IDS = pa.list_(pa.int32())

SCHEMA = pa.schema(
    [
        ("prompt", pa.string()),
        ("human", pa.string()),
        ("own", pa.string()),
        ("prompt_ids", _IDS),
        ("human_ids", _IDS),
        ("own_ids", _IDS),
        ("human_logp", pa.float64()),  # sums over the answer's tokens under the model that gave `own`, in nats
        ("own_logp", pa.float64()),
        ("finish_reason", pa.string()),  # "stop": ended by itself; "length": cut at the limit
        ("row", pa.int64()),  # index of the source row among the held-out ones
    ]
)
# mixed into the seed, so that these answers are drawn with other numbers than those that are trained against
_STREAM = 0x4845_4C44


class HeldOutPlay:
    """Plays on the run's held-out prompts, over all ranks; does nothing where there are none.

    Args:
        run: Settings and held-out prompts.
        trainer: The host's trainer: wrapped model, logging, trackers.
        ranks: All of them.
        sampling: How answers are drawn, as in training.
        pad_token_id: Fills padding.
        scorer: Training's.
    """

    def __init__(self, run: SpinRun, trainer: Any, ranks: Ranks, sampling: Sampling, pad_token_id: int, scorer: Scorer):
        self.run = run
        self.trainer = trainer
        self.ranks = ranks
        self.sampling = sampling
        self.scorer = scorer
        generation = run.settings.generation
        # whatever `generation.backend` is: an engine's start would cost more than so few answers
        self.backend = TransformersBackend(
            ranks, sampling, pad_token_id, generation.batch_size, generation.gather_weights
        )

    def before(self) -> dict[str, float]:
        """Plays with the model that the run starts from, writes `start/heldout.parquet` and logs the usual figures.

        Returns:
            The same figures as `spin/heldout_start_*`; none without held-out prompts.
        """
        if self.run.heldout is None:
            return {}
        figures = self._play("start", None)
        return {name.replace(HELD_OUT, START): value for name, value in figures.items()}

    def after(self, entry: IterationPlan) -> dict[str, float]:
        """Plays with the model that an iteration resulted in, writes `heldout.parquet` and logs the figures.

        The same model gives the same answers and figures, so an iteration's end may be run again.

        Args:
            entry: The iteration.

        Returns:
            The figures under their public names; none without held-out prompts.
        """
        if self.run.heldout is None:
            return {}
        return self._play(f"iteration {entry.iteration}", entry.iteration)

    def _play(self, name: str, iteration: int | None) -> dict[str, float]:
        """Plays once.

        Args:
            name: Whose answers they are, for people.
            iteration: Which iteration resulted in the model; None for the start model.

        Returns:
            The figures, the same on every rank.
        """
        number = 0 if iteration is None else iteration + 1
        started = time.perf_counter()
        model = self.trainer.model_wrapped
        with frozen(model):
            answers = self._answer(model, name, number)
            columns = self.run.heldout.with_format("arrow")[:].combine_chunks()
            limit = self.run.settings.generation.max_new_tokens
            own = pa.array([answer.ids for answer in answers], type=_IDS)
            human = columns["chosen_ids"].combine_chunks()
            pairs = pa.table(
                {
                    "prompt_ids": columns["prompt_ids"].combine_chunks(),
                    "chosen_ids": human,
                    "rejected_ids": end_alike(human, own, self.sampling.stop_token_ids, limit),
                    "row": columns["row"].combine_chunks(),
                }
            )
            dataset = PairDataset(pairs, images=self.run.heldout_images)
            batches = chunk_rows(dataset.padded_lengths(), self.trainer.args.per_device_train_batch_size)
            logps = self.scorer.logps(model, dataset, batches).numpy()
        table = self._table(pairs, columns["row"], answers, logps)
        figures = measure(table, self.sampling.stop_token_ids)
        if iteration is not None:
            figures.update(self.ranks.on_main(lambda: self._beside_the_one_before(table, iteration)))
        figures["spin/heldout_seconds"] = time.perf_counter() - started
        self.ranks.say(f"{name}: {_line(figures, len(table))}")
        self.trainer.log(dict(figures))  # which adds keys of the host's
        send_samples(self.trainer, table, name)
        if self.ranks.main:
            marked = table.replace_schema_metadata({MARK: mark_of(self.run.identity, iteration).encode()})
            write_whole(
                self.run.directory.heldout(iteration),
                lambda aside: pq.write_table(marked, aside, write_page_checksum=True),
            )
        return figures

    def _beside_the_one_before(self, table: pa.Table, iteration: int) -> dict[str, float]:
        """Returns the figures of an iteration's play beside that of the model before it; none where that is not on disk."""
        before = iteration - 1 if iteration else None
        found = play_before(self.run.directory.heldout(before), mark_of(self.run.identity, before), table)
        return {} if found is None else head_to_head(table, found)

    def _answer(self, model: Any, name: str, number: int) -> list[Completion]:
        """Returns an answer to each held-out prompt, on every rank."""
        generation = self.run.settings.generation
        seed = play_seed(self.run.sampling_seed, number)
        images = self.run.heldout_images
        chunks = Chunks.of(self.run.heldout, generation, self.run.sequence_len, seed, images)
        mine = sum(len(part) for index, part in chunks.rows() if index % self.ranks.count == self.ranks.rank)
        found: list[tuple[int, Completion]] = []
        with self.ranks.bar(f"{name}: held-out play", mine, "answer") as bar:

            def keep(chunk: Chunk, completions: list[Completion]) -> None:
                found.extend(zip(chunk.rows, completions, strict=True))
                bar.update(len(completions))

            self.backend.answer(model, chunks, keep)
        self.ranks.meet_again()  # with few prompts some ranks have none, and a collective does not wait for long answers
        answers = dict(gather_object(found))
        wanted = len(self.run.heldout)
        assert len(answers) == wanted, f"{len(answers)} of {wanted} held-out prompts were answered"
        return [answers[row] for row in range(wanted)]

    def _table(self, pairs: pa.Table, rows: Any, answers: Sequence[Completion], logps: np.ndarray) -> pa.Table:
        ids = {"prompt": pairs["prompt_ids"], "human": pairs["chosen_ids"], "own": pairs["rejected_ids"]}
        decode, prompts = self.run.decode, pairs["prompt_ids"].to_pylist()
        columns = {
            "prompt": decode(prompts),
            **{name: answer_texts(prompts, ids[name].to_pylist(), decode) for name in ("human", "own")},
            **{f"{name}_ids": values for name, values in ids.items()},
            "human_logp": logps[:, 0],
            "own_logp": logps[:, 1],
            "finish_reason": [answer.finish_reason for answer in answers],
            "row": rows,
        }
        return pa.table({name: columns[name] for name in SCHEMA.names}, schema=SCHEMA)


def play_seed(seed: int, number: int) -> int:
    """Returns the seed of a play's answers, another than that of any iteration's.

    Args:
        seed: Of the run's sampling.
        number: Which play of the run it is: 0 for the start model's, then one more than the iteration.
    """
    return iteration_seed(iteration_seed(seed, _STREAM), number)


def measure(table: pa.Table, stop_token_ids: Sequence[int]) -> dict[str, float]:
    """Measures a play.

    Args:
        table: Of `SCHEMA`.
        stop_token_ids: Tokens that end an answer; they are counted in its length, but not in its bigrams.

    Returns:
        Under public names: the mean margin between human and own answers in nats per token, their AUC, mean tokens of both,
        and the share of different bigrams in the own answers. What cannot be told is left out: bigrams where no answer has
        two tokens; margin and AUC where a log-prob is no number.
    """
    own_ids = table["own_ids"].to_pylist()
    human_lengths = np.array([len(ids) for ids in table["human_ids"].to_pylist()])
    own_lengths = np.array([len(ids) for ids in own_ids])
    answered = own_lengths > 0  # an empty answer whose end takes no part has no token to be likely
    figures = {
        "spin/heldout_length": float(own_lengths.mean()),
        "spin/heldout_human_length": float(human_lengths.mean()),
    }
    if not answered.any():
        LOG.warning("held-out play: all own answers are empty, so there is no margin and no AUC")
    elif (spread := spread_of_play(table)) is not None:
        human = (table["human_logp"].to_numpy() / human_lengths)[answered]
        own = table["own_logp"].to_numpy()[answered] / own_lengths[answered]
        figures["spin/heldout_margin"] = float((human - own).mean())
        figures["spin/heldout_auc"] = spread.value
        if spread.stderr is not None:
            figures["spin/heldout_auc_stderr"] = spread.stderr
    else:
        LOG.warning("held-out play: log-probs are NaN or infinite, so there is no margin and no AUC")
    distinct = distinct_2([ids[:-1] if ids and ids[-1] in stop_token_ids else ids for ids in own_ids])
    return figures if distinct is None else {**figures, "spin/heldout_distinct_2": distinct}


def _line(figures: dict[str, float], prompts: int) -> str:
    parts = [f"held-out play on {prompts} prompts in {figures['spin/heldout_seconds']:.1f} s"]
    if "spin/heldout_auc" in figures:
        spread = f" ± {figures['spin/heldout_auc_stderr']:.3f}" if "spin/heldout_auc_stderr" in figures else ""
        parts.append(f"AUC {figures['spin/heldout_auc']:.3f}{spread} (0.5: own and human answers look alike)")
        parts.append(f"margin {figures['spin/heldout_margin']:+.3f} nats per token")
    parts.append(
        f"own answers {figures['spin/heldout_length']:.1f} tokens, human {figures['spin/heldout_human_length']:.1f}"
    )
    if "spin/heldout_distinct_2" in figures:
        parts.append(f"distinct-2 {figures['spin/heldout_distinct_2']:.2f}")
    for name, words in (("wins", "human answers are likelier"), ("length_wins", "lengths are nearer")):
        if f"spin/heldout_{name}" in figures:
            parts.append(f"{words} than before on {figures[f'spin/heldout_{name}']:.0%}")
    return ", ".join(parts)
