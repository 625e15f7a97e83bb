"""An iteration's pairs: the policy answers its prompts, and scores both answers as its own opponent.

Data flows from prompts to answers (`_generate`, in chunks over the ranks), from answers and the previous iteration's
pairs to a file that every rank maps (`_assemble`), through one forward pass of the policy as its own opponent (`_score`)
to `pairs.parquet` (`_write`). The opponent needs no second model: at an iteration's start it is the policy, and its
log-probs are on disk before the first optimizer step.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from axolotl_spin.data.endings import pairs_end_alike
from axolotl_spin.data.initial_pairs import GivenPairs
from axolotl_spin.data.pairs import (
    LOGPS,
    SCHEMA,
    PairDataset,
    read_batches,
    read_pairs,
    schema_of,
    with_texts,
    write_pairs,
)
from axolotl_spin.data.staging import STAGED, AnswerStore, read_staged, write_staged
from axolotl_spin.data.thoughts import told_apart
from axolotl_spin.disk.atomic import DamagedFileError, ForeignFileError, StaleFileError
from axolotl_spin.game.health import (
    Finding,
    act_on,
    check_answers,
    check_opponent_logps,
    check_weights,
    count_answers,
)
from axolotl_spin.generation.backend import Backend, Completion
from axolotl_spin.generation.chunk_files import ChunkFiles
from axolotl_spin.generation.chunks import Chunk, Chunks, iteration_seed
from axolotl_spin.ranks.bare import bare
from axolotl_spin.ranks.main import Ranks
from axolotl_spin.run.checkpoints import lost_pairs
from axolotl_spin.run.plan import IterationPlan
from axolotl_spin.run.prepare import SpinRun
from axolotl_spin.training.policy import frozen, nonfinite_weights, weights_digest
from axolotl_spin.training.scoring import Scorer

# under their public names
Figures = dict[str, float]


class SelfPlay:
    """Makes each iteration's pairs, over all ranks.

    Args:
        run: Settings, prompts and plan.
        ranks: All of them.
        backend: Answers prompts.
        scorer: Scores pairs.
        batches: Returns the micro-batches in which an iteration's pairs will be trained on.
        stops: Tokens that end an answer.
    """

    def __init__(
        self,
        run: SpinRun,
        ranks: Ranks,
        backend: Backend,
        scorer: Scorer,
        batches: Callable[[PairDataset, IterationPlan], Sequence[np.ndarray]],
        stops: Sequence[int],
    ):
        self.run = run
        self.ranks = ranks
        self.backend = backend
        self.scorer = scorer
        self.batches = batches
        self.stops = stops
        self._weights = ""  # digest of the opponent's, where this start has them

    def begin(self, entry: IterationPlan, model: Any, fresh: bool = True) -> tuple[PairDataset, Figures]:
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
        self._weights = weights_digest(model, self.ranks.accelerator) if fresh else ""
        found = self.ranks.on_main(lambda: self._stage_file(entry))
        if isinstance(found, ForeignFileError):
            raise ForeignFileError(f"{found}: choose another `output_dir`, or move the file away")
        if found is None:
            pairs, figures = self._take_file(entry)
        elif not fresh:
            raise ValueError(lost_pairs(found, self.run, entry.iteration))
        else:
            if isinstance(found, DamagedFileError):
                by = "these" if isinstance(found, StaleFileError) else "the same opponent"
                self.ranks.say(f"{found}: they are made again, by {by}")
            pairs, figures = self._make(entry, model)
        kept = f" ({entry.kept_rows} kept from before)" if entry.kept_rows else ""
        self.ranks.say(
            f"iteration {entry.iteration}: training on {entry.rows} pairs{kept}, {entry.epochs} epoch(s), "
            f"{entry.steps} steps, learning rate {entry.learning_rate:g}, beta {entry.beta:g}"
        )
        return pairs, {"spin/iteration": entry.iteration, "spin/beta": entry.beta, **figures}

    def end(self, entry: IterationPlan) -> None:
        """Removes what only the iteration's training needed, after its last step."""
        if self.ranks.ferry.keeps:
            self.run.directory.staged(entry.iteration).unlink(missing_ok=True)

    def _make(self, entry: IterationPlan, model: Any) -> tuple[PairDataset, Figures]:
        """Answers, or takes what is given; scores; writes."""
        bad = nonfinite_weights(bare(model, self.ranks.accelerator), frozen=True)
        act_on(check_weights(bad, step=entry.first_step), self.ranks.main)
        given = self.run.given if entry.iteration == 0 else None
        with frozen(model):
            pairs, made = self._take(given, entry) if given else self._generate(entry, model)
            pairs, scored = self._score(entry, model, pairs)
        self.ranks.on_main(lambda: self._write(entry, pairs))
        return pairs, {**made, **scored}

    # -- generation ---------------------------------------------------------------------------------------------------

    def _generate(self, entry: IterationPlan, model: Any) -> tuple[PairDataset, Figures]:
        """Answers the prompts; finished chunks are on disk, so an interrupted phase makes only the missing ones.

        Returns:
            The iteration's pairs, still without the opponent's log-probs, and figures.
        """
        started = time.perf_counter()
        iteration, settings = entry.iteration, self.run.settings.generation
        files = ChunkFiles(self.run.directory, iteration, self.run.identity.before(iteration), self._weights)
        seed = iteration_seed(self.run.sampling_seed, iteration)
        self.ranks.ferry.fetch(files.folder)  # of a start that was stopped
        finished = self.ranks.on_main(lambda: files.finished(entry.new_rows))
        chunks = Chunks.of(self.run.prompts_of(entry), settings, self.run.sequence_len, seed, self.run.images)
        todo = chunks.left(finished)
        if finished.chunks:
            done = int(finished.answered.sum())
            self.ranks.say(f"iteration {iteration}: {done} of {entry.new_rows} prompts are already answered")

        def keep(chunk: Chunk, completions: list[Completion]) -> None:
            files.write(chunk, completions)
            self.ranks.check()

        waiting = sum(len(rows) for _, rows in todo.rows())
        with self.ranks.answering(f"generating/{iteration}", f"iteration {iteration}: generating", waiting):
            apart = self.backend.answer(model, todo, keep, iteration)
            self.ranks.meet(f"generated/{iteration}")
        self.ranks.ferry.fetch(files.folder)
        staged = self.run.directory.staged(iteration)
        self.ranks.on_main(lambda: write_staged(staged, self._assemble(entry, files)))
        pairs = PairDataset(self._map(entry), images=self.run.images)
        counts = self._count(pairs, entry)
        seconds, apart = time.perf_counter() - started, self.ranks.on_main(lambda: apart)
        made = ~finished.answered  # an earlier start's answers took none of this one's seconds
        drawn = int(pairs.lengths("rejected_ids")[: entry.new_rows][made].sum())
        rate = drawn / max(seconds - sum(apart.values()), 1e-9)
        count = f"{entry.new_rows}" if made.all() else f"{made.sum()} of {entry.new_rows}"
        self.ranks.say(
            f"iteration {iteration}: generated {count} answers in {seconds:.1f} s ({rate:.0f} tokens/s; mean "
            f"{counts['spin/rejected_length']:.1f} tokens, human {counts['spin/chosen_length']:.1f}; "
            f"{counts['spin/truncated']:.1%} cut, {counts['spin/empty']:.1%} empty, "
            f"{counts['spin/identical']:.1%} identical to the human's)"
        )
        phase = {"spin/generation_seconds": seconds}
        if drawn:
            phase["spin/generation_tokens_per_second"] = rate
        return pairs, {**counts, **apart, **phase}

    def _assemble(self, entry: IterationPlan, files: ChunkFiles) -> Iterator[pa.RecordBatch]:
        """Yields the new pairs, in the order of the prompts, and those kept from the previous iteration."""
        answers = AnswerStore(self.run.directory.iteration(entry.iteration), entry.new_rows)
        for _, table in files.tables(entry.new_rows):
            answers.add(table)
        if len(missing := answers.missing()):
            raise FileNotFoundError(
                f"{len(missing)} answers of iteration {entry.iteration} are missing after generation, the first to prompts "
                f"{missing[:5].tolist()}: were files in {files.folder} removed meanwhile?"
            )
        rows = 0
        for batch in answers.paired(self.run.prompts_of(entry), entry.iteration):
            yield self._ended_alike(batch)
            rows += len(batch)
        if entry.kept_rows:
            for batch in self._kept(self.run.plan.iterations[entry.iteration - 1]):
                yield batch
                rows += len(batch)
        assert rows == entry.rows, f"{rows} pairs, but the plan has {entry.rows}"

    def _take(self, given: GivenPairs, entry: IterationPlan) -> tuple[PairDataset, Figures]:
        """Takes the iteration's pairs from `spin.initial_pairs`, still without the opponent's log-probs."""
        staged = self.run.directory.staged(entry.iteration)
        self.ranks.on_main(lambda: write_staged(staged, map(self._ended_alike, given.staged())))
        pairs = PairDataset(self._map(entry), images=self.run.images)
        counts = self._count(pairs, entry)
        self.ranks.say(f"iteration {entry.iteration}: took {entry.new_rows} pairs from {given.source}")
        return pairs, counts

    def _count(self, pairs: PairDataset, entry: IterationPlan) -> Figures:
        """Returns lengths and fractions of the iteration's answers, after checking that they teach something."""
        settings = self.run.settings
        counts = self.ranks.on_main(lambda: count_answers(pairs.table, entry.iteration, self.stops))
        findings = check_answers(
            counts,
            entry.iteration,
            sft_weight=settings.sft_weight,
            max_new_tokens=settings.generation.max_new_tokens,
            sample=self.run.tokenizer.decode(counts.first),
        )
        findings += self.ranks.on_main(lambda: self._about_thoughts(pairs.table, entry))
        act_on(findings, self.ranks.main)
        return counts.shares()

    def _ended_alike(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        return pairs_end_alike(batch, self.stops, self.run.settings.generation.max_new_tokens)

    def _about_thoughts(self, pairs: pa.Table, entry: IterationPlan) -> list[Finding]:
        new = pairs.slice(0, entry.new_rows)
        line = told_apart(self.run.thoughts, new["chosen_ids"], new["rejected_ids"])
        return [Finding(f"iteration {entry.iteration}: {line}", fatal=False)] if line else []

    # -- the opponent's pass ------------------------------------------------------------------------------------------

    def _score(self, entry: IterationPlan, model: Any, pairs: PairDataset) -> tuple[PairDataset, Figures]:
        """Adds the opponent's log-probs of both answers, kept pairs included: they have a new opponent too."""
        started = time.perf_counter()
        mine = -(-len(pairs) // self.ranks.count)
        with self.ranks.bar(f"iteration {entry.iteration}: scoring", mine, "pair") as bar:
            logps = self.scorer.logps(model, pairs, self.batches(pairs, entry), bar.update).numpy()
        act_on(check_opponent_logps(logps, entry.iteration), self.ranks.main)
        seconds = time.perf_counter() - started
        self.ranks.say(f"iteration {entry.iteration}: scored {entry.rows} pairs in {seconds:.1f} s")
        return PairDataset(pairs.table, logps, self.run.images), {"spin/scoring_seconds": seconds}

    # -- files --------------------------------------------------------------------------------------------------------

    def _stage_file(self, entry: IterationPlan) -> Exception | None:
        """Stages an iteration's pairs where they are on disk and whole; else returns what is wrong with them."""
        batches = (batch.select(STAGED.names) for batch in self._read(entry, weights=self._weights))
        try:
            write_staged(self.run.directory.staged(entry.iteration), batches)
        except (FileNotFoundError, DamagedFileError, ForeignFileError) as error:
            return error
        return None

    def _take_file(self, entry: IterationPlan) -> tuple[PairDataset, Figures]:
        """Returns the iteration's pairs as an earlier start wrote them."""
        path, mark = self.run.directory.pairs(entry.iteration), self.run.identity.before(entry.iteration)
        self.ranks.say(f"iteration {entry.iteration}: using the pairs in {path}")
        if self.ranks.ferry.keeps:  # a run stopped between writing them and this
            ChunkFiles(self.run.directory, entry.iteration, "").remove()
        logps = self.ranks.on_main(lambda: read_pairs(path, mark, entry.rows, LOGPS))
        columns = np.stack([logps[name] for name in LOGPS], axis=1)
        pairs = PairDataset(self._map(entry), columns, self.run.images)
        return pairs, self._count(pairs, entry)

    def _map(self, entry: IterationPlan) -> pa.Table:
        """Maps the iteration's staged pairs, which rank 0 has written."""
        self.ranks.ferry.send(staged := self.run.directory.staged(entry.iteration))
        return read_staged(staged)

    def _write(self, entry: IterationPlan, pairs: PairDataset) -> None:
        """Writes the iteration's pairs with their log-probs and texts. Call it on one rank."""
        directory, mark = self.run.directory, self.run.identity.before(entry.iteration)
        texts, schema = with_texts(pairs, self.run.decode), schema_of(self.run.images)
        write_pairs(directory.pairs(entry.iteration), texts, mark, self._weights, schema)
        ChunkFiles(directory, entry.iteration, mark).remove()

    def _read(
        self, entry: IterationPlan, columns: Sequence[str] = tuple(SCHEMA.names), weights: str = ""
    ) -> Iterator[pa.RecordBatch]:
        mark = self.run.identity.before(entry.iteration)
        return read_batches(self.run.directory.pairs(entry.iteration), mark, entry.rows, columns, weights)

    def _kept(self, entry: IterationPlan) -> Iterator[pa.RecordBatch]:
        """Yields those pairs of the iteration before that are trained on again."""
        oldest = entry.iteration + 1 - self.run.settings.history
        try:
            for batch in self._read(entry, STAGED.names):
                yield batch.filter(pc.greater_equal(batch["generated_in"], oldest))
        except (FileNotFoundError, DamagedFileError, ForeignFileError) as error:
            raise ValueError(lost_pairs(error, self.run, entry.iteration)) from error
