"""The self-play loop of one iteration: the policy answers every prompt, scores the pairs, and is trained on them.

Data flows from prompts to answers (`_generate`, in chunks over the ranks), from answers and the previous iteration's
pairs to a table (`_assemble`), through one forward pass of the policy as its own opponent (`_score`) to
`pairs.parquet`, from which every rank trains. The opponent needs no second model: at an iteration's start it is the
policy, and its log-probs are on disk before the first optimizer step.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from accelerate.utils import broadcast_object_list
from axolotl.utils.logging import get_logger
from tqdm import tqdm

from axolotl_spin.artifacts import DamagedFileError, ForeignFileError
from axolotl_spin.chunks import ChunkFiles
from axolotl_spin.generation import Backend, Chunk, Completion, chunk_rows, chunk_size, iteration_seed, token_limit
from axolotl_spin.health import check_answers, check_opponent_logps, check_weights, describe_pairs, report
from axolotl_spin.pairs import SCHEMA, PairDataset, read_pairs, write_pairs
from axolotl_spin.peers import Peers
from axolotl_spin.plan import IterationPlan
from axolotl_spin.policy import frozen, nonfinite_weights
from axolotl_spin.resume import lost_pairs
from axolotl_spin.run import SpinRun
from axolotl_spin.scoring import Scorer

LOG = get_logger(__name__)


class SelfPlay:
    """Makes each iteration's pairs, over all ranks.

    Args:
        run: Settings, prompts and plan.
        accelerator: The trainer's: ranks, device, barriers.
        backend: Answers prompts.
        scorer: Scores pairs.
        peers: Tells what happened to the other ranks.
    """

    def __init__(
        self,
        run: SpinRun,
        accelerator: Any,
        backend: Backend,
        scorer: Scorer,
        peers: Peers,
    ):
        self.run = run
        self.accelerator = accelerator
        self.backend = backend
        self.scorer = scorer
        self.peers = peers

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
        found = self._agree(self._look_for_pairs(entry) if main else None)
        if isinstance(found, ForeignFileError):
            raise ForeignFileError(f"{found}: choose another `output_dir`, or move the file away")
        if found is None:
            self._say(f"iteration {entry.iteration}: using the pairs in {path}")
            if main:  # a run stopped between writing them and this
                ChunkFiles(self.run.directory, entry.iteration, "").remove()
        elif not fresh:
            raise ValueError(lost_pairs(found, self.run, entry.iteration))
        else:
            if isinstance(found, DamagedFileError):
                self._say(f"{found}: they are made again, by the same opponent")
            bad = nonfinite_weights(self.accelerator.unwrap_model(model), frozen=True)
            report(check_weights(bad, step=entry.first_step), main)
            with frozen(model):
                pairs = self._generate(entry, model, figures)
                self._check(pairs, entry)
                pairs = self._score(entry, model, pairs, figures)
            self._write(entry, pairs)
        dataset = PairDataset(self._read(entry))
        if found is None:
            self._check(dataset.table, entry)
        figures.update(describe_pairs(dataset.table, entry.iteration))
        kept = f" ({entry.kept_rows} kept from before)" if entry.kept_rows else ""
        self._say(
            f"iteration {entry.iteration}: training on {entry.rows} pairs{kept}, {entry.epochs} epoch(s), "
            f"{entry.steps} steps, learning rate {entry.learning_rate:g}, beta {entry.beta:g}"
        )
        return dataset, figures

    def _look_for_pairs(self, entry: IterationPlan) -> Exception | None:
        """Returns None where an iteration's pairs are on disk and whole, else what is wrong with them."""
        try:
            self._read(entry)
        except (FileNotFoundError, DamagedFileError, ForeignFileError) as error:
            return error
        return None

    def _check(self, pairs: pa.Table, entry: IterationPlan) -> None:
        settings = self.run.settings
        limit = settings.generation.max_new_tokens
        findings = check_answers(pairs, entry.iteration, sft_weight=settings.sft_weight, max_new_tokens=limit)
        report(findings, self.accelerator.is_main_process)

    # -- generation ---------------------------------------------------------------------------------------------------

    def chunks(self, iteration: int) -> list[Chunk]:
        """Returns an iteration's work for the backend; the same on any number of ranks."""
        settings = self.run.settings.generation
        seed = settings.seed if settings.seed is not None else self.run.seed
        prompts = self.run.prompts.with_format("numpy")["prompt_ids"][:]
        size = chunk_size(len(prompts), settings.batch_size)
        limits = [
            token_limit(len(p), max_new_tokens=settings.max_new_tokens, sequence_len=self.run.sequence_len)
            for p in prompts
        ]
        return [
            Chunk(
                index=index,
                rows=tuple(rows),
                prompts=tuple(prompts[row] for row in rows),
                limits=tuple(limits[row] for row in rows),
                seed=iteration_seed(seed, iteration),
            )
            for index, rows in enumerate(chunk_rows([len(p) for p in prompts], size))
        ]

    def _generate(self, entry: IterationPlan, model: Any, figures: dict[str, float]) -> pa.Table:
        """Answers every prompt; finished chunks are on disk, so an interrupted phase makes only the missing ones.

        Returns:
            The iteration's pairs, still without the opponent's log-probs.
        """
        started = time.perf_counter()
        iteration = entry.iteration
        files = ChunkFiles(self.run.directory, iteration, self.run.identity.before(iteration))
        chunks = self.chunks(iteration)
        main = self.accelerator.is_main_process
        done = set(self._agree([chunk.index for chunk in chunks if files.read(chunk) is not None] if main else []))
        todo = [chunk for chunk in chunks if chunk.index not in done]
        if len(todo) < len(chunks):
            self._say(f"iteration {iteration}: {len(chunks) - len(todo)} of {len(chunks)} chunks are already answered")
        mine = len(range(self.accelerator.process_index, len(todo), self.accelerator.num_processes))
        with self._bar(f"iteration {iteration}: generating", mine, "chunk") as bar:
            for chunk, completions in self.backend.answer(model, todo):
                files.write(chunk, completions)
                self.peers.check()
                bar.update()
        self.accelerator.wait_for_everyone()
        answers: list[Completion | None] = [None] * entry.new_rows
        for chunk in chunks:
            completions_on_disk = files.read(chunk)
            if completions_on_disk is None:
                raise FileNotFoundError(
                    f"chunk {chunk.index} of iteration {iteration} is missing after generation: `output_dir` must be on a "
                    "filesystem that all nodes share"
                )
            for row, completion in zip(chunk.rows, completions_on_disk, strict=True):
                answers[row] = completion
        missing = [row for row, answer in enumerate(answers) if answer is None]
        assert not missing, f"{len(missing)} prompts were not answered, the first are {missing[:5]}"
        seconds = time.perf_counter() - started
        pairs = self._assemble(entry, answers)  # type: ignore[arg-type]
        about = describe_pairs(pairs, iteration)
        rate = about["spin/rejected_length"] * entry.new_rows / seconds
        figures.update({"spin/generation_seconds": seconds, "spin/generation_tokens_per_second": rate})
        self._say(
            f"iteration {iteration}: generated {entry.new_rows} answers in {seconds:.1f} s ({rate:.0f} tokens/s; mean "
            f"{about['spin/rejected_length']:.1f} tokens, human {about['spin/chosen_length']:.1f}; "
            f"{about['spin/truncated']:.1%} cut, {about['spin/empty']:.1%} empty, "
            f"{about['spin/identical']:.1%} identical to the human's)"
        )
        return pairs

    def _assemble(self, entry: IterationPlan, answers: Sequence[Completion]) -> pa.Table:
        """Joins new pairs and those kept from the previous iteration; log-probs are still to be scored."""
        prompts = self.run.prompts.with_format("arrow")[:]
        rejected = [answer.ids for answer in answers]
        new = {
            "prompt_ids": prompts["prompt_ids"],
            "chosen_ids": prompts["chosen_ids"],
            "rejected_ids": pa.array(rejected, type=pa.list_(pa.int32())),
            "prompt": self._decode(prompts["prompt_ids"]),
            "chosen": self._decode(prompts["chosen_ids"]),
            "rejected": self._decode(rejected),
            "finish_reason": [answer.finish_reason for answer in answers],
            "generated_in": np.full(len(answers), entry.iteration, dtype=np.int32),
            "opponent_chosen_logp": np.full(len(answers), np.nan),
            "opponent_rejected_logp": np.full(len(answers), np.nan),
            "row": prompts["row"],
        }
        table = pa.table([pa.chunked_array([_as_array(new[f.name], f.type)]) for f in SCHEMA], schema=SCHEMA)
        if entry.kept_rows:
            before = self._kept(self.run.plan.iterations[entry.iteration - 1])
            oldest = entry.iteration - self.run.settings.history
            kept = before.filter(pc.greater_equal(before["generated_in"], oldest))
            table = pa.concat_tables([table, kept.replace_schema_metadata(None)])
        assert table.num_rows == entry.rows, f"{table.num_rows} pairs, but the plan has {entry.rows}"
        return table

    def _decode(self, ids: Any) -> list[str]:
        return self.run.tokenizer.batch_decode(ids if isinstance(ids, list) else ids.to_pylist())

    # -- the opponent's pass ------------------------------------------------------------------------------------------

    def _score(self, entry: IterationPlan, model: Any, pairs: pa.Table, figures: dict[str, float]) -> pa.Table:
        """Fills in the opponent's log-probs of both answers, kept pairs included: they have a new opponent too."""
        started = time.perf_counter()
        dataset = PairDataset(pairs)
        mine = -(-len(dataset) // self.accelerator.num_processes)
        with self._bar(f"iteration {entry.iteration}: scoring", mine, "pair") as bar:
            logps = self.scorer.logps(model, dataset, bar.update).numpy()
        report(check_opponent_logps(logps, entry.iteration), self.accelerator.is_main_process)
        seconds = figures["spin/scoring_seconds"] = time.perf_counter() - started
        self._say(f"iteration {entry.iteration}: scored {entry.rows} pairs in {seconds:.1f} s")
        for column, name in enumerate(("opponent_chosen_logp", "opponent_rejected_logp")):
            field = SCHEMA.get_field_index(name)
            pairs = pairs.set_column(field, SCHEMA.field(name), pa.array(logps[:, column]))
        return pairs

    # -- files and reports --------------------------------------------------------------------------------------------

    def _write(self, entry: IterationPlan, pairs: pa.Table) -> None:
        directory, mark = self.run.directory, self.run.identity.before(entry.iteration)
        if self.accelerator.is_main_process:
            write_pairs(directory.pairs(entry.iteration), pairs, mark)
            ChunkFiles(directory, entry.iteration, mark).remove()
        self.accelerator.wait_for_everyone()

    def _read(self, entry: IterationPlan) -> pa.Table:
        mark = self.run.identity.before(entry.iteration)
        return read_pairs(self.run.directory.pairs(entry.iteration), mark, entry.rows)

    def _kept(self, entry: IterationPlan) -> pa.Table:
        """Reads the pairs of the iteration before, from which some are kept."""
        try:
            return self._read(entry)
        except (FileNotFoundError, DamagedFileError, ForeignFileError) as error:
            raise ValueError(lost_pairs(error, self.run, entry.iteration)) from error

    def _agree(self, value: Any) -> Any:
        """Returns rank 0's value on every rank: what one rank finds on disk, all must act on."""
        box = [value]
        broadcast_object_list(box)
        return box[0]

    def _say(self, line: str) -> None:
        if self.accelerator.is_main_process:
            LOG.info(line)

    def _bar(self, description: str, total: int, unit: str) -> tqdm:
        return tqdm(desc=description, total=total, unit=unit, disable=not self.accelerator.is_main_process)


def _as_array(values: Any, kind: pa.DataType) -> pa.Array:
    if isinstance(values, pa.ChunkedArray):
        values = values.combine_chunks()
    return values.cast(kind) if isinstance(values, pa.Array) else pa.array(values, type=kind)
