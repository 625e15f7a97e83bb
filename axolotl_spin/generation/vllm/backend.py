"""The vLLM backend: the opponent is written once, and engines in processes of their own answer it.

    policy -> opponent on disk -> an engine a GPU, or a group of them (`engine.py`) -> answers -> engines gone -> training

The first rank of each group of `tensor_parallel_size` ranks starts and follows an engine; the others wait. Chunks go to the
engines in turn.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import psutil
import torch
from axolotl.utils.logging import get_logger

from axolotl_spin.disk.directory import RunDirectory
from axolotl_spin.generation.backend import Completion, Keep, Sampling
from axolotl_spin.generation.chunks import Chunk, Chunks
from axolotl_spin.generation.vllm.engine import KEY, Engine, EngineError
from axolotl_spin.generation.vllm.offload import offloaded
from axolotl_spin.generation.vllm.served import ServedModel
from axolotl_spin.ranks.main import Ranks
from axolotl_spin.ranks.nodes import ranks_here
from axolotl_spin.settings.generation import VllmConfig

LOG = get_logger(__name__)

# bytes of keys and values of an engine on a CPU, where vLLM would take nine tenths of the machine's memory
_LARGEST_CPU_CACHE = 4 << 30


class VllmBackend:
    """Answers chunks with vLLM engines.

    Args:
        ranks: All of them: who has an engine, who fails, the bar.
        sampling: How answers are drawn.
        settings: The `spin.generation.vllm`.
        served: The model.
        directory: The run's.
        save: Writes the policy (the adapter alone, where there is one) to a folder; every rank calls it.
        optimizer: Returns the trainer's, as wrapped; its state can be offloaded.
    """

    def __init__(
        self,
        ranks: Ranks,
        sampling: Sampling,
        settings: VllmConfig,
        served: ServedModel,
        directory: RunDirectory,
        save: Callable[[Path], None],
        optimizer: Callable[[], Any],
    ):
        self.ranks, self.sampling, self.settings, self.served = ranks, sampling, settings, served
        self.directory, self.save, self.optimizer = directory, save, optimizer
        group = settings.tensor_parallel_size
        self.engines = ranks.count // group
        self.engine, place = divmod(ranks.rank, group)
        self.leads = place == 0

    def share(self, chunks: int) -> range:
        """Returns the positions of the chunks that this rank's engine answers."""
        return range(self.engine, chunks, self.engines)

    def answer(self, model: Any, chunks: Chunks, keep: Keep, iteration: int = 0) -> dict[str, float]:
        """See `Backend.answer`.

        Raises:
            EngineError: An engine could not start, died, hung, or answered what it was not asked.
            PeerFailedError: That happened on another rank.
        """
        if not len(chunks):
            return {}
        opponent, figures = self._write_opponent(iteration)
        roots = [model, self.optimizer()]
        device = self.ranks.device
        if device.type != "cpu":
            torch.accelerator.empty_cache()  # what training's allocator keeps in reserve
        with offloaded(roots, device) if self.settings.offload else nullcontext():
            self.ranks.meet(f"opponent/{iteration}")  # its memory is free on every rank
            mine = self.share(len(chunks))
            if self.leads and mine:
                seconds = self._follow(chunks, mine, iteration, opponent, keep)
                figures = {**figures, "spin/engine_start_seconds": seconds}
            self.ranks.meet(f"engines/{iteration}")  # and is again, before any rank brings training back
        if self.ranks.ferry.keeps and opponent.name.startswith("."):
            shutil.rmtree(opponent, ignore_errors=True)
        return figures

    def _write_opponent(self, iteration: int) -> tuple[Path, dict[str, float]]:
        """Returns the folder of the opponent (what the last iteration ended with, where that is on disk), and figures."""
        kept = self.directory.model(iteration - 1) if iteration else None
        folder = self.directory.opponent(iteration)
        if kept is not None and self.ranks.on_main(kept.exists):
            return self._brought(kept, folder), {}
        started = time.perf_counter()
        self.ranks.on_main(lambda: shutil.rmtree(folder, ignore_errors=True))
        self.save(folder)
        seconds = time.perf_counter() - started
        LOG.info(f"iteration {iteration}: the opponent was written for vLLM in {seconds:.1f} s")
        return self._brought(folder, folder), {"spin/opponent_write_seconds": seconds}

    def _brought(self, opponent: Path, folder: Path) -> Path:
        """Returns where this rank finds what rank 0 has of the opponent: on a node that does not see it, in `folder`."""
        ferry = self.ranks.ferry
        mine = folder if ferry.far else opponent
        ferry.send(mine)
        return mine

    def _follow(self, chunks: Chunks, mine: Sequence[int], iteration: int, opponent: Path, keep: Keep) -> float:
        """Has an engine answer some of the chunks; returns the seconds until it was ready."""
        folder = self.directory.engine(iteration, self.engine)
        adapter = self.served.lora_rank is not None
        engine_arguments = self.served.arguments(self.settings, None if adapter else opponent)
        changes = self._fit(engine_arguments)
        job: dict[str, Any] = {
            "engine": engine_arguments,
            "sampling": sampling_arguments(self.sampling),
            "adapter": str(opponent.absolute()) if adapter else None,
        }
        pictures = folder / "pictures" if chunks.images is not None else None
        if chunks.images is not None:
            job["never"] = list(chunks.images.placeholders)
        requests = (request(chunks[position], pictures) for position in mine)
        positions = {chunks.index_at(position): position for position in mine}
        started = time.perf_counter()
        answers, tokens, seconds = 0, 0, 0.0
        stall = self.settings.stall_seconds
        with Engine(self.settings.python, folder, job, requests, changes, stall, pictures) as engine:
            for event in engine.events(self.ranks.check):
                if event["event"] == "ready":
                    seconds = time.perf_counter() - started
                    self.ranks.start_clock()
                    LOG.info(
                        f"iteration {iteration}: vLLM {event['version']} was ready after {seconds:.1f} s, for "
                        f"{event['at_once']} answers at once"
                    )
                elif event["event"] == "progress":
                    self.ranks.made(event["answers"] - answers, event["tokens"] - tokens)
                    answers, tokens = event["answers"], event["tokens"]
                elif event["event"] == "chunk":
                    position = positions.pop(event["index"], None)
                    if position is None:
                        raise EngineError(engine.failure(f"answered chunk {event['index']}, which it was not asked"))
                    chunk = chunks[position]
                    try:
                        completions = checked(chunk, event["ids"], event["finish"], self.sampling)
                    except ValueError as error:
                        raise EngineError(engine.failure(f"answered wrongly: {error}")) from error
                    keep(chunk, completions)
            if positions:
                raise EngineError(engine.failure(f"ended with {len(positions)} chunks unanswered"))
        return seconds

    def _fit(self, arguments: dict[str, Any]) -> dict[str, str]:
        """Gives the engine the memory that training leaves; returns the environment variables that name its devices."""
        device = self.ranks.device
        here = ranks_here(otherwise=self.ranks.count)
        engines = max(1, here // self.settings.tensor_parallel_size)
        if device.type == "cpu":
            sized = {"kv_cache_memory_bytes", "gpu_memory_utilization", "num_gpu_blocks_override"} & set(arguments)
            if not sized and "VLLM_CPU_KVCACHE_SPACE" not in os.environ:
                free = psutil.virtual_memory().available // (4 * here)
                arguments["kv_cache_memory_bytes"] = min(_LARGEST_CPU_CACHE, free)
            return {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // engines))}  # launchers set 1
        free, total = torch.accelerator.get_memory_info(device)
        arguments["gpu_memory_utilization"] = share_of_memory(self.settings.gpu_memory_utilization, free, total)
        rocm = torch.version.hip is not None
        return visible_devices(device.index or 0, self.settings.tensor_parallel_size, os.environ, rocm=rocm)


def sampling_arguments(sampling: Sampling) -> dict[str, Any]:
    """Returns the arguments of `vllm.SamplingParams` that hold for every answer."""
    arguments: dict[str, Any] = {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "stop_token_ids": list(sampling.stop_token_ids),
    }
    if sampling.top_k:
        arguments["top_k"] = sampling.top_k
    return arguments


def request(chunk: Chunk, pictures: Path | None = None) -> dict[str, Any]:
    """Returns a chunk as the worker reads it. An answer's seed depends on the chunk's and on the prompt's row alone.

    Args:
        chunk: What is asked.
        pictures: Where the prompts' pictures are left, in a folder of the chunk's; None where all is text.
    """
    prompts = [[int(token) for token in prompt] for prompt in chunk.prompts]
    asked = {
        "index": chunk.index,
        "prompts": prompts,
        "limits": list(chunk.limits),
        "seeds": [answer_seed(chunk.seed, row) for row in chunk.rows],
    }
    if pictures is None:
        return asked
    assert chunk.images is not None
    (pictures / str(chunk.index)).mkdir(parents=True)
    unprocessed, files = [], []
    for place, (source, prompt) in enumerate(zip(chunk.sources, prompts, strict=True)):
        ids, found = chunk.images.unprocessed(source, prompt)
        paths = [pictures / str(chunk.index) / f"{place}-{number}.png" for number in range(len(found))]
        for picture, path in zip(found, paths, strict=True):
            picture.save(path, compress_level=1)
        unprocessed.append(ids)
        files.append([str(path.absolute()) for path in paths])
    return {**asked, "prompts": unprocessed, "processed": prompts, "pictures": files}


def answer_seed(seed: int, row: int) -> int:
    """Returns a 62-bit seed for one answer."""
    digest = hashlib.sha256(f"{seed}/{row}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 2


def checked(chunk: Chunk, ids: Any, reasons: Any, sampling: Sampling) -> list[Completion]:
    """Returns a chunk's answers, after a look at whether they are such.

    Args:
        chunk: What was asked.
        ids: What came back: a list of token ids for each prompt.
        reasons: Why each ended.
        sampling: How they were to be drawn.

    Raises:
        ValueError: An answer is missing, empty, too long, has a stop token in its middle, or ended for another reason.
    """
    if not (isinstance(ids, list) and isinstance(reasons, list) and len(ids) == len(reasons) == len(chunk.rows)):
        count = len(ids) if isinstance(ids, list) else 0
        raise ValueError(f"{count} answers to the {len(chunk.rows)} prompts of chunk {chunk.index}")
    stops = set(sampling.stop_token_ids)
    never = set(chunk.images.placeholders) if chunk.images else set()
    completions = []
    for row, limit, answer, reason in zip(chunk.rows, chunk.limits, ids, reasons, strict=True):
        if not isinstance(answer, list) or not answer or not all(type(token) is int and token >= 0 for token in answer):
            raise ValueError(f"the answer to prompt {row} is no list of token ids")
        if not never.isdisjoint(answer):
            raise ValueError(f"the answer to prompt {row} has a token that stands for a picture")
        stopped = [position for position, token in enumerate(answer) if token in stops]
        ended = reason == "stop" and stopped == [len(answer) - 1] and len(answer) <= limit
        was_cut = reason == "length" and not stopped and len(answer) == limit
        if not ended and not was_cut:
            raise ValueError(
                f"the answer to prompt {row} ended by {reason!r} after {len(answer)} of at most {limit} tokens, with stop "
                f"tokens at {stopped[:3]}"
            )
        completions.append(Completion(answer, reason))
    return completions


def share_of_memory(wanted: float | None, free: int, total: int) -> float:
    """Returns which share of a GPU's memory an engine takes (`gpu_memory_utilization`).

    Args:
        wanted: The `spin.generation.vllm.gpu_memory_utilization`; None takes nine tenths of what is free.
        free: Bytes that training leaves free.
        total: Bytes of the GPU.

    Raises:
        EngineError: Less is free than what is wanted; says how much, and what to set.
    """
    if wanted is None:
        return round(0.9 * free / total, 3)
    if wanted * total > free:
        raise EngineError(
            f"`{KEY}.gpu_memory_utilization: {wanted:g}` is {wanted * total / 2**30:.1f} GiB of the GPU's "
            f"{total / 2**30:.1f}, and training leaves {free / 2**30:.1f} GiB free: set it to at most "
            f"{0.98 * free / total:.2f}, remove it, or set `{KEY}.offload: true`"
        )
    return wanted


def visible_devices(first: int, count: int, variables: Mapping[str, str], *, rocm: bool = False) -> dict[str, str]:
    """Returns the environment variables that show an engine some of the GPUs that this process sees.

    Args:
        first: Number of the first GPU, as this process counts them.
        count: How many.
        variables: This process's own.
        rocm: The GPUs are AMD's, of which `HIP_VISIBLE_DEVICES` counts first; vLLM refuses to start where the two differ.
    """
    hip = variables.get("HIP_VISIBLE_DEVICES") if rocm else None
    variable = hip or variables.get("CUDA_VISIBLE_DEVICES")
    names: Sequence[str] = variable.split(",") if variable else [str(number) for number in range(first + count)]
    shown = ",".join(names[first : first + count])
    return {"CUDA_VISIBLE_DEVICES": shown, **({"HIP_VISIBLE_DEVICES": shown} if hip else {})}
