"""The self-play loop of one iteration: the policy answers every prompt, scores the pairs, and is trained on them.

Data flows from prompts to answers (`_generate`, in chunks over the ranks), from answers and the previous iteration's
pairs to a file that every rank maps (`_assemble`), through one forward pass of the policy as its own opponent (`_score`)
to `pairs.parquet` (`_write`). The opponent needs no second model: at an iteration's start it is the policy, and its
log-probs are on disk before the first optimizer step.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from accelerate.utils import broadcast_object_list
from axolotl.utils.logging import get_logger
from tqdm import tqdm

from axolotl_spin.data.initial_pairs import GivenPairs
from axolotl_spin.data.pairs import BATCH_ROWS, LOGPS, SCHEMA, PairDataset, read_batches, read_pairs, write_pairs
from axolotl_spin.data.prompts import token_counts
from axolotl_spin.data.staging import STAGED, Answers, read_staged, write_staged
from axolotl_spin.disk.atomic import DamagedFileError, ForeignFileError
from axolotl_spin.game.health import check_answers, check_opponent_logps, check_weights, count_answers, report
from axolotl_spin.generation.backend import Backend
from axolotl_spin.generation.chunk_files import ChunkFiles
from axolotl_spin.generation.chunks import Chunks, chunk_rows, chunk_size, iteration_seed, token_limit
from axolotl_spin.ranks.bar import Tally
from axolotl_spin.ranks.peers import Peers
from axolotl_spin.run.checkpoints import lost_pairs
from axolotl_spin.run.plan import IterationPlan
from axolotl_spin.run.prepare import SpinRun
from axolotl_spin.training.policy import frozen, nonfinite_weights
from axolotl_spin.training.scoring import Scorer

LOG = get_logger(__name__)
T = TypeVar("T")


class SelfPlay:
    """Makes each iteration's pairs, over all ranks.

    Args:
        run: Settings, prompts and plan.
        accelerator: The trainer's: ranks, device, barriers.
        backend: Answers prompts.
        scorer: Scores pairs.
        peers: Tells what happened to the other ranks.
        tally: Shows how far the backend is.
    """

    def __init__(
        self,
        run: SpinRun,
        accelerator: Any,
        backend: Backend,
        scorer: Scorer,
        peers: Peers,
        tally: Tally,
    ):
        self.run = run
        self.accelerator = accelerator
        self.backend = backend
        self.scorer = scorer
        self.peers = peers
        self.tally = tally

    def begin(self, entry: IterationPlan, model: Any, fresh: bool = True) -> tuple[PairDataset, dict[str, float]]:
        """Freezes the policy as the opponent and makes the iteration's pairs, or reads those already made.

        Args:
            entry: The iteration.
            model: The policy as the trainer wraps it.
            fresh: The iteration has not taken a step yet. Else its pairs must be on disk: the opponent's weights are gone.

        Returns:
            The pairs with the opponent's log-probs, and the figures of generation and scoring under their public names.

        Raises:
            ForeignFileError: The pairs on disk are another run's.
            ValueError: The pairs of an iteration that has begun are missing or damaged.
            UnhealthyRunError: Nothing can be learnt from the answers, or the log-probs are not numbers.
        """
        path = self.run.directory.pairs(entry.iteration)
        figures: dict[str, float] = {"spin/iteration": entry.iteration, "spin/beta": entry.beta}
        main = self.accelerator.is_main_process
        found = self._on_main(lambda: self._stage_file(entry))
        if isinstance(found, ForeignFileError):
            raise ForeignFileError(f"{found}: choose another `output_dir`, or move the file away")
        if found is None:
            self._say(f"iteration {entry.iteration}: using the pairs in {path}")
            if main:  # a run stopped between writing them and this
                ChunkFiles(self.run.directory, entry.iteration, "").remove()
            pairs = PairDataset(read_staged(self.run.directory.staged(entry.iteration)), self._read_logps(entry))
            figures.update(self._count(pairs, entry))
        elif not fresh:
            raise ValueError(lost_pairs(found, self.run, entry.iteration))
        else:
            if isinstance(found, DamagedFileError):
                self._say(f"{found}: they are made again, by the same opponent")
            bad = nonfinite_weights(self.accelerator.unwrap_model(model), frozen=True)
            report(check_weights(bad, step=entry.first_step), main)
            with frozen(model):
                given = self.run.given if entry.iteration == 0 else None
                pairs = self._take(given, entry, figures) if given else self._generate(entry, model, figures)
                pairs = self._score(entry, model, pairs, figures)
            self._on_main(lambda: self._write(entry, pairs))
        kept = f" ({entry.kept_rows} kept from before)" if entry.kept_rows else ""
        self._say(
            f"iteration {entry.iteration}: training on {entry.rows} pairs{kept}, {entry.epochs} epoch(s), "
            f"{entry.steps} steps, learning rate {entry.learning_rate:g}, beta {entry.beta:g}"
        )
        return pairs, figures

    def end(self, entry: IterationPlan) -> None:
        """Removes what only the iteration's training needed, after its last step."""
        if self.accelerator.is_main_process:
            self.run.directory.staged(entry.iteration).unlink(missing_ok=True)

    def _stage_file(self, entry: IterationPlan) -> Exception | None:
        """Stages an iteration's pairs where they are on disk and whole; else returns what is wrong with them."""
        batches = (batch.select(STAGED.names) for batch in self._read(entry))
        try:
            write_staged(self.run.directory.staged(entry.iteration), batches)
        except (FileNotFoundError, DamagedFileError, ForeignFileError) as error:
            return error
        return None

    def _count(self, pairs: PairDataset, entry: IterationPlan) -> dict[str, float]:
        """Returns lengths and fractions of the iteration's answers, after checking that they teach something."""
        settings = self.run.settings
        counts = self._on_main(lambda: count_answers(pairs.table, entry.iteration))
        findings = check_answers(
            counts,
            entry.iteration,
            sft_weight=settings.sft_weight,
            max_new_tokens=settings.generation.max_new_tokens,
            sample=self.run.tokenizer.decode(counts.first),
        )
        report(findings, self.accelerator.is_main_process)
        return counts.shares()

    def _take(self, given: GivenPairs, entry: IterationPlan, figures: dict[str, float]) -> PairDataset:
        """Takes the iteration's pairs from `spin.initial_pairs`, still without the opponent's log-probs."""
        staged = self.run.directory.staged(entry.iteration)
        self._on_main(lambda: write_staged(staged, given.staged()))
        pairs = PairDataset(read_staged(staged))
        figures.update(self._count(pairs, entry))
        self._say(f"iteration {entry.iteration}: took {entry.new_rows} pairs from {given.source}")
        return pairs

    # -- generation ---------------------------------------------------------------------------------------------------

    def chunks(self, iteration: int) -> Chunks:
        """Returns an iteration's work for the backend; the same on any number of ranks."""
        settings = self.run.settings.generation
        seed = settings.seed if settings.seed is not None else self.run.seed
        lengths = token_counts(self.run.prompts, "prompt_ids")
        rows = chunk_rows(lengths, chunk_size(len(lengths), settings.batch_size))

        def limit(prompt: int) -> int:
            return token_limit(prompt, max_new_tokens=settings.max_new_tokens, sequence_len=self.run.sequence_len)

        return Chunks(self.run.prompts, rows, limit, iteration_seed(seed, iteration))

    def _generate(self, entry: IterationPlan, model: Any, figures: dict[str, float]) -> PairDataset:
        """Answers every prompt; finished chunks are on disk, so an interrupted phase makes only the missing ones.

        Returns:
            The iteration's pairs, still without the opponent's log-probs.
        """
        started = time.perf_counter()
        iteration = entry.iteration
        files = ChunkFiles(self.run.directory, iteration, self.run.identity.before(iteration))
        chunks = self.chunks(iteration)
        done = self._on_main(lambda: {index for index, rows in chunks.rows() if files.read(index, rows) is not None})
        todo = chunks.without(done)
        if len(todo) < len(chunks):
            self._say(f"iteration {iteration}: {len(chunks) - len(todo)} of {len(chunks)} chunks are already answered")
        waiting = sum(len(rows) for _, rows in todo.rows())
        with self.tally.bar(f"generating/{iteration}", f"iteration {iteration}: generating", waiting):
            for chunk, completions in self.backend.answer(model, todo, iteration):
                files.write(chunk, completions)
                self.tally.pulse()
            self.peers.meet(f"generated/{iteration}")
        staged = self.run.directory.staged(iteration)
        self._on_main(lambda: write_staged(staged, self._assemble(entry, chunks, files)))
        pairs = PairDataset(read_staged(staged))
        about = self._count(pairs, entry)
        seconds = time.perf_counter() - started
        apart = self._on_main(lambda: self.backend.figures)
        rate = about["spin/rejected_length"] * entry.new_rows / max(seconds - sum(apart.values()), 1e-9)
        figures.update(
            {**about, **apart, "spin/generation_seconds": seconds, "spin/generation_tokens_per_second": rate}
        )
        self._say(
            f"iteration {iteration}: generated {entry.new_rows} answers in {seconds:.1f} s ({rate:.0f} tokens/s; mean "
            f"{about['spin/rejected_length']:.1f} tokens, human {about['spin/chosen_length']:.1f}; "
            f"{about['spin/truncated']:.1%} cut, {about['spin/empty']:.1%} empty, "
            f"{about['spin/identical']:.1%} identical to the human's)"
        )
        return pairs

    def _assemble(self, entry: IterationPlan, chunks: Chunks, files: ChunkFiles) -> Iterator[pa.RecordBatch]:
        """Yields the new pairs, in the order of the prompts, and those kept from the previous iteration."""
        answers = Answers(self.run.directory.iteration(entry.iteration), entry.new_rows)
        for index, of_chunk in chunks.rows():
            found = files.read(index, of_chunk)
            if found is None:
                raise FileNotFoundError(
                    f"chunk {index} of iteration {entry.iteration} is missing after generation: `output_dir` must be "
                    "on a filesystem that all nodes share"
                )
            answers.add(found)
        missing = answers.missing()
        assert not len(missing), f"{len(missing)} prompts were not answered, the first are {missing[:5]}"
        rows, prompts = 0, self.run.prompts.with_format("arrow")
        for start in range(0, entry.new_rows, BATCH_ROWS):
            part = prompts[start : start + BATCH_ROWS].combine_chunks()
            rejected, reasons = answers.between(start, start + len(part))
            columns = {
                **{name: part[name] for name in ("prompt_ids", "chosen_ids", "row")},
                "rejected_ids": rejected,
                "finish_reason": reasons,
                "generated_in": np.full(len(part), entry.iteration, dtype=np.int32),
            }
            yield pa.record_batch([_as_array(columns[field.name], field.type) for field in STAGED], schema=STAGED)
            rows += len(part)
        if entry.kept_rows:
            for batch in self._kept(self.run.plan.iterations[entry.iteration - 1]):
                yield batch
                rows += len(batch)
        assert rows == entry.rows, f"{rows} pairs, but the plan has {entry.rows}"

    # -- the opponent's pass ------------------------------------------------------------------------------------------

    def _score(self, entry: IterationPlan, model: Any, pairs: PairDataset, figures: dict[str, float]) -> PairDataset:
        """Adds the opponent's log-probs of both answers, kept pairs included: they have a new opponent too."""
        started = time.perf_counter()
        mine = -(-len(pairs) // self.accelerator.num_processes)
        with self._bar(f"iteration {entry.iteration}: scoring", mine, "pair") as bar:
            logps = self.scorer.logps(model, pairs, bar.update).numpy()
        report(check_opponent_logps(logps, entry.iteration), self.accelerator.is_main_process)
        seconds = figures["spin/scoring_seconds"] = time.perf_counter() - started
        self._say(f"iteration {entry.iteration}: scored {entry.rows} pairs in {seconds:.1f} s")
        return PairDataset(pairs.table, logps)

    # -- files and reports --------------------------------------------------------------------------------------------

    def _write(self, entry: IterationPlan, pairs: PairDataset) -> None:
        """Writes the iteration's pairs with their log-probs and texts. Call it on one rank."""
        directory, mark = self.run.directory, self.run.identity.before(entry.iteration)
        write_pairs(directory.pairs(entry.iteration), self._with_texts(pairs), mark)
        ChunkFiles(directory, entry.iteration, mark).remove()

    def _with_texts(self, pairs: PairDataset) -> Iterator[pa.RecordBatch]:
        assert pairs.logps is not None
        start = 0
        for batch in pairs.table.to_batches(max_chunksize=BATCH_ROWS):
            logps = pairs.logps[start : start + len(batch)]
            start += len(batch)
            columns = {
                **{name: batch[name] for name in STAGED.names},
                **{name: logps[:, column] for column, name in enumerate(LOGPS)},
                **{
                    name: self.run.tokenizer.batch_decode(batch[f"{name}_ids"].to_pylist())
                    for name in ("prompt", "chosen", "rejected")
                },
            }
            yield pa.record_batch([_as_array(columns[field.name], field.type) for field in SCHEMA], schema=SCHEMA)

    def _read(self, entry: IterationPlan, columns: Sequence[str] = tuple(SCHEMA.names)) -> Iterator[pa.RecordBatch]:
        mark = self.run.identity.before(entry.iteration)
        return read_batches(self.run.directory.pairs(entry.iteration), mark, entry.rows, columns)

    def _read_logps(self, entry: IterationPlan) -> np.ndarray:
        mark = self.run.identity.before(entry.iteration)
        logps = read_pairs(self.run.directory.pairs(entry.iteration), mark, entry.rows, LOGPS)
        return np.stack([logps[name].to_numpy() for name in LOGPS], axis=1)

    def _kept(self, entry: IterationPlan) -> Iterator[pa.RecordBatch]:
        """Yields those pairs of the iteration before that are trained on again."""
        oldest = entry.iteration + 1 - self.run.settings.history
        try:
            for batch in self._read(entry, STAGED.names):
                yield batch.filter(pc.greater_equal(batch["generated_in"], oldest))
        except (FileNotFoundError, DamagedFileError, ForeignFileError) as error:
            raise ValueError(lost_pairs(error, self.run, entry.iteration)) from error

    def _on_main(self, work: Callable[[], T]) -> T:
        """Has rank 0 do something while the others wait; what it returns or raises, all do."""
        box: list[Any] = [None, None]
        if self.accelerator.is_main_process:
            try:
                box[0] = work()
            except Exception as error:
                box[1] = error
        broadcast_object_list(box)
        if box[1] is not None:
            raise box[1]
        return box[0]

    def _say(self, line: str) -> None:
        if self.accelerator.is_main_process:
            LOG.info(line)

    def _bar(self, description: str, total: int, unit: str) -> tqdm:
        shown = self.accelerator.is_main_process
        # gone at its end: the phase's line has the figures, and the training's bar stays the only one
        return tqdm(desc=description, total=total, unit=unit, leave=False, dynamic_ncols=True, disable=not shown)


def _as_array(values: Any, kind: pa.DataType) -> pa.Array:
    if isinstance(values, pa.ChunkedArray):
        values = values.combine_chunks()
    return values.cast(kind) if isinstance(values, pa.Array) else pa.array(values, type=kind)
