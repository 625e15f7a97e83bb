"""The self-play loop of one iteration: the policy answers every prompt, scores the pairs, and is trained on them.

Data flows from prompts to answers (`_generate`, in chunks over the ranks), from answers and the previous iteration's
pairs to a table (`_assemble`), through one forward pass of the policy as its own opponent (`_score`) to
`pairs.parquet`, from which every rank trains. The opponent needs no second model: at an iteration's start it is the
policy, and its log-probs are on disk before the first optimizer step.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from accelerate.utils import broadcast_object_list
from axolotl.utils.logging import get_logger
from tqdm import tqdm

from axolotl_spin.artifacts import write_whole
from axolotl_spin.generation import Backend, Chunk, Completion, chunk_rows, chunk_seed, token_limit
from axolotl_spin.logprobs import completion_logps
from axolotl_spin.pairs import SCHEMA, PairCollator, PairDataset, read_pairs, write_pairs
from axolotl_spin.plan import IterationPlan
from axolotl_spin.run import SpinRun

LOG = get_logger(__name__)


class SelfPlay:
    """Makes each iteration's pairs, over all ranks.

    Args:
        run: Settings, prompts and plan.
        accelerator: The trainer's: ranks, device, barriers.
        backend: Answers prompts.
        collator: Makes the batches that are scored.
        score_batch: Pairs in one forward of the scoring pass on one rank.
    """

    def __init__(self, run: SpinRun, accelerator: Any, backend: Backend, collator: PairCollator, score_batch: int):
        self.run = run
        self.accelerator = accelerator
        self.backend = backend
        self.collator = collator
        self.score_batch = score_batch

    def begin(self, entry: IterationPlan, model: Any, fresh: bool = True) -> tuple[PairDataset, dict[str, float]]:
        """Freezes the policy as the opponent and makes the iteration's pairs, or reads those already made.

        Args:
            entry: The iteration.
            model: The policy as the trainer wraps it.
            fresh: The iteration has not taken a step yet. Else its pairs must be on disk: the opponent's weights are gone.

        Returns:
            The pairs with the opponent's log-probs, and the figures of generation and scoring under their public names.
        """
        path = self.run.directory.pairs(entry.iteration)
        figures: dict[str, float] = {"spin/iteration": entry.iteration, "spin/beta": entry.beta}
        if self._agree(path.exists()):
            self._say(f"iteration {entry.iteration}: using the pairs in {path}")
        elif fresh:
            with _frozen(model):
                pairs = self._score(entry, model, self._generate(entry, model, figures), figures)
            self._write(entry, pairs)
        else:
            raise FileNotFoundError(
                f"{path} is missing, and the opponent that made it is gone: put the file back, or resume from a "
                f"checkpoint at the start of iteration {entry.iteration}"
            )
        dataset = PairDataset(self._read(entry))
        figures.update(describe_pairs(dataset.table, entry.iteration))
        kept = f" ({entry.kept_rows} kept from before)" if entry.kept_rows else ""
        self._say(
            f"iteration {entry.iteration}: training on {entry.rows} pairs{kept}, {entry.epochs} epoch(s), "
            f"{entry.steps} steps, learning rate {entry.learning_rate:g}, beta {entry.beta:g}"
        )
        return dataset, figures

    # -- generation ---------------------------------------------------------------------------------------------------

    def chunks(self, iteration: int) -> list[Chunk]:
        """Returns an iteration's work for the backend; the same on any number of ranks."""
        settings = self.run.settings.generation
        seed = settings.seed if settings.seed is not None else self.run.seed
        prompts = self.run.prompts.with_format("numpy")["prompt_ids"][:]
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
                seed=chunk_seed(seed, iteration, index),
            )
            for index, rows in enumerate(chunk_rows([len(p) for p in prompts], settings.batch_size))
        ]

    def _generate(self, entry: IterationPlan, model: Any, figures: dict[str, float]) -> pa.Table:
        """Answers every prompt; finished chunks are on disk, so an interrupted phase makes only the missing ones.

        Returns:
            The iteration's pairs, still without the opponent's log-probs.
        """
        started = time.perf_counter()
        directory, iteration = self.run.directory, entry.iteration
        chunks = self.chunks(iteration)
        done = set(self._agree([c.index for c in chunks if directory.chunk(iteration, c.index).exists()]))
        todo = [chunk for chunk in chunks if chunk.index not in done]
        if len(todo) < len(chunks):
            self._say(f"iteration {iteration}: {len(chunks) - len(todo)} of {len(chunks)} chunks are already answered")
        mine = len(range(self.accelerator.process_index, len(todo), self.accelerator.num_processes))
        with self._bar(f"iteration {iteration}: generating", mine, "chunk") as bar:
            for chunk, completions in self.backend.answer(model, todo):
                path = directory.chunk(iteration, chunk.index)
                write_whole(path, lambda aside, done=completions: _write_completions(aside, done))
                bar.update()
        self.accelerator.wait_for_everyone()
        answers: list[Completion | None] = [None] * entry.new_rows
        for chunk in chunks:
            path = directory.chunk(iteration, chunk.index)
            if not path.exists():
                raise FileNotFoundError(
                    f"{path} is missing after generation: `output_dir` must be on a filesystem that all nodes share"
                )
            for row, completion in zip(chunk.rows, _read_completions(path), strict=True):
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
            before = read_pairs(self.run.directory.pairs(entry.iteration - 1), self.run.hash)
            oldest = entry.iteration - self.run.settings.history
            kept = before.filter(pc.greater_equal(before["generated_in"], oldest))
            table = pa.concat_tables([table, kept.replace_schema_metadata(None)])
        assert table.num_rows == entry.rows, f"{table.num_rows} pairs, but the plan has {entry.rows}"
        return table

    def _decode(self, ids: Any) -> list[str]:
        return self.run.tokenizer.batch_decode(ids if isinstance(ids, list) else ids.to_pylist())

    # -- the opponent's pass ------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _score(self, entry: IterationPlan, model: Any, pairs: pa.Table, figures: dict[str, float]) -> pa.Table:
        """Fills in the opponent's log-probs of both answers, kept pairs included: they have a new opponent too."""
        started = time.perf_counter()
        accelerator = self.accelerator
        dataset = PairDataset(pairs)
        length = dataset.lengths("prompt_ids") + np.maximum(
            dataset.lengths("chosen_ids"), dataset.lengths("rejected_ids")
        )
        order = np.argsort(-length, kind="stable")
        batches = [order[start : start + self.score_batch] for start in range(0, len(order), self.score_batch)]
        rounds = -(-len(batches) // accelerator.num_processes)  # as many forwards on each rank
        logps = torch.zeros(len(dataset), 2, dtype=torch.float64, device=accelerator.device)
        scored = torch.zeros(len(dataset), dtype=torch.int32, device=accelerator.device)
        with self._bar(f"iteration {entry.iteration}: scoring", rounds, "batch") as bar:
            for turn in range(rounds):
                position = turn * accelerator.num_processes + accelerator.process_index
                rows = batches[min(position, len(batches) - 1)]
                batch = self.collator([dataset[row] for row in rows])
                batch = {key: value.to(accelerator.device) for key, value in batch.items()}
                both = completion_logps(model, batch).double().view(2, len(rows)).T  # (pairs, 2)
                if position < len(batches):
                    logps[torch.from_numpy(rows)] = both
                    scored[torch.from_numpy(rows)] += 1
                bar.update()
        logps, scored = accelerator.reduce(logps, "sum"), accelerator.reduce(scored, "sum")
        wrong = torch.nonzero(scored != 1).flatten().tolist()
        assert not wrong, f"{len(wrong)} pairs were not scored exactly once, the first are {wrong[:5]}"
        seconds = figures["spin/scoring_seconds"] = time.perf_counter() - started
        self._say(f"iteration {entry.iteration}: scored {entry.rows} pairs in {seconds:.1f} s")
        for column, name in enumerate(("opponent_chosen_logp", "opponent_rejected_logp")):
            field = SCHEMA.get_field_index(name)
            pairs = pairs.set_column(field, SCHEMA.field(name), pa.array(logps[:, column].cpu().numpy()))
        return pairs

    # -- files and reports --------------------------------------------------------------------------------------------

    def _write(self, entry: IterationPlan, pairs: pa.Table) -> None:
        directory = self.run.directory
        if self.accelerator.is_main_process:
            write_pairs(directory.pairs(entry.iteration), pairs, self.run.hash)
            for chunk in sorted((directory.iteration(entry.iteration) / "chunks").glob("*.parquet")):
                chunk.unlink()
            (directory.iteration(entry.iteration) / "chunks").rmdir()
        self.accelerator.wait_for_everyone()

    def _read(self, entry: IterationPlan) -> pa.Table:
        path = self.run.directory.pairs(entry.iteration)
        if not path.exists():
            raise FileNotFoundError(f"{path} is missing: `output_dir` must be on a filesystem that all nodes share")
        pairs = read_pairs(path, self.run.hash)
        if pairs.num_rows != entry.rows:
            raise ValueError(
                f"{path} has {pairs.num_rows} pairs, but the plan has {entry.rows}: delete it and start again"
            )
        return pairs

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


def describe_pairs(pairs: pa.Table, iteration: int) -> dict[str, float]:
    """Returns lengths in tokens and fractions over the pairs generated in an iteration, under their public names."""
    new = pairs.filter(pc.equal(pairs["generated_in"], iteration)).combine_chunks()
    rejected = pc.list_value_length(new["rejected_ids"]).to_numpy()
    same = [a == b for a, b in zip(new["chosen_ids"].to_pylist(), new["rejected_ids"].to_pylist(), strict=True)]
    ended = pc.equal(new["finish_reason"], "stop").to_numpy()
    return {
        "spin/rejected_length": float(rejected.mean()),
        "spin/chosen_length": float(pc.list_value_length(new["chosen_ids"]).to_numpy().mean()),
        "spin/truncated": float((~ended).mean()),
        # an answer that is nothing but its end token says nothing
        "spin/empty": float((rejected - ended <= 0).mean()),
        "spin/identical": float(np.mean(same)),
    }


@contextmanager
def _frozen(model: Any) -> Iterator[None]:
    """Puts the policy into `eval()` as the opponent, and back afterwards; gradient checkpointing is not touched."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
        if hasattr(model, "reshard"):  # FSDP2: a forward without backward leaves the root's parameters gathered
            model.reshard()


def _as_array(values: Any, kind: pa.DataType) -> pa.Array:
    if isinstance(values, pa.ChunkedArray):
        values = values.combine_chunks()
    return values.cast(kind) if isinstance(values, pa.Array) else pa.array(values, type=kind)


def _write_completions(path: Any, completions: Sequence[Completion]) -> None:
    ids = pa.array([completion.ids for completion in completions], type=pa.list_(pa.int32()))
    reasons = pa.array([completion.finish_reason for completion in completions], type=pa.string())
    pq.write_table(pa.table({"ids": ids, "finish_reason": reasons}), path)


def _read_completions(path: Any) -> list[Completion]:
    table = pq.read_table(path)
    return [
        Completion(ids, reason)
        for ids, reason in zip(table["ids"].to_pylist(), table["finish_reason"].to_pylist(), strict=True)
    ]
