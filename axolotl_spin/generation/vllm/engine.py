"""A vLLM engine as a process of its own: started, followed through what it writes, and gone at the end.

`worker.py` is what runs there, possibly in another Python environment; JOB, which it reads, has these keys:

    parent     this process's number: the engine ends when it is gone
    engine     arguments of `vllm.EngineArgs`, by their names
    sampling   arguments of `vllm.SamplingParams` that hold for every request
    adapter    folder of a LoRA adapter, or null
    never      tokens that no answer may have; left out where there are none
    requests, events, report    files; see there
    versions, check_model       for the check: the first version that works and the first that does not, as [major, minor];
                                whether the model is to be looked at
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from axolotl_spin.generation.vllm import worker

WORKER = Path(worker.__file__).absolute()
KEY = "spin.generation.vllm"
# what a launcher says to its ranks means something else to vLLM
_LAUNCHER = (
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_"),
    *("ACCELERATE_", "FSDP_", "DS_", "DEEPSPEED_", "AXOLOTL_"),
)
# how torch's allocator is told what to do; the host asks for segments that can grow
_ALLOCATORS = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
# sockets, if any, on the loopback interface; nothing is reported to anybody
_FIXED = {
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_LOOPBACK_IP": "127.0.0.1",
    "GLOO_SOCKET_IFNAME": "lo",
    "NCCL_SOCKET_IFNAME": "lo",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
}
# a line of the log, and what helps against it
_ADVICE = (
    (
        ("less than desired GPU memory utilization", "less than desired CPU memory utilization"),
        f"lower `{KEY}.gpu_memory_utilization`, or set `{KEY}.offload: true`",
    ),
    (
        ("No available memory for the cache blocks", "larger than the maximum number of tokens that can be stored"),
        f"raise `{KEY}.gpu_memory_utilization`, lower `{KEY}.max_model_len`, or set `{KEY}.offload: true`",
    ),
    (
        ("out of memory", "OutOfMemoryError"),
        f"lower `{KEY}.gpu_memory_utilization`, or `{KEY}.max_num_seqs`, or set `{KEY}.offload: true`",
    ),
    (
        ("other tokens of a prompt with pictures",),
        "set `spin.generation.backend: transformers`: this model's pictures are processed otherwise there",
    ),
)


class EngineError(RuntimeError):
    """An engine could not start, died, hung, or did not do what it was asked to."""


def interpreter(python: str | None) -> str:
    """Returns the path of the Python that has vLLM.

    Args:
        python: The `spin.generation.vllm.python`; None is the one that runs.

    Raises:
        ValueError: There is no such file, or it cannot be run.
    """
    if python is None:
        return sys.executable
    found = shutil.which(os.path.expanduser(python))
    if found is None:
        raise ValueError(
            f"`{KEY}.python: {python}` is no program that can be run: give the path of the Python in the environment "
            "where vLLM is installed, such as /opt/vllm/bin/python"
        )
    return found


def environment(program: str, changes: dict[str, str]) -> dict[str, str]:
    """Returns the environment variables of an engine: the user's, without what was meant for this process.

    Args:
        program: The engine's interpreter.
        changes: What is set for this engine.
    """
    kept = {key: value for key, value in os.environ.items() if not key.startswith(_LAUNCHER)}
    if program != sys.executable:  # paths of this environment hold other versions of what vLLM imports
        for key in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"):
            kept.pop(key, None)
    for key in _ALLOCATORS:  # GPUs of one engine share no memory that can move (vLLM's issue 42609)
        said = kept.pop(key, "").split(",")
        if rest := ",".join(part for part in said if not part.strip().startswith("expandable_segments:")):
            kept[key] = rest
    # one process where one suffices: nothing that could outlive it, and a start without importing everything twice
    kept.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    return {**kept, **_FIXED, **changes}


class Engine:
    """A running engine; a context at whose end its processes are gone.

    Args:
        python: The `spin.generation.vllm.python`.
        folder: For its files: requests, events, log. Left where it fails, removed where it does not.
        job: `engine`, `sampling` and `adapter` of the job.
        requests: What it is to answer, a JSON line each; see `worker`.
        changes: Environment variables set for it.
        stall_seconds: How long it may go without progress.
        pictures: Folder in which requests leave their pictures, a folder for each chunk. With it a request is made when the
            engine soon needs it, and its pictures go with its answers.
    """

    def __init__(
        self,
        python: str | None,
        folder: Path,
        job: dict[str, Any],
        requests: Iterator[dict[str, Any]],
        changes: dict[str, str],
        stall_seconds: float,
        pictures: Path | None = None,
    ):
        self.folder, self.stall_seconds, self.pictures = folder, stall_seconds, pictures
        self._requests, self._more = requests, True
        self._asked, self._enough = 0, 1  # prompts without an answer; how many there are to be
        self.log = folder / "engine.log"
        self._events = folder / "events.jsonl"
        shutil.rmtree(folder, ignore_errors=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700)  # prompts, answers, and what the engine says
        (folder / "requests.jsonl").touch()
        while self._ask() and not pictures:
            pass
        self._events.touch()
        files = {"requests": str(folder / "requests.jsonl"), "events": str(self._events)}
        job_path = folder / "job.json"
        job_path.write_text(json.dumps({"parent": os.getpid(), **job, **files}))
        program = interpreter(python)
        self._command = [program, str(WORKER), "answer", str(job_path)]
        self._environment = environment(program, changes)
        self._process: subprocess.Popen | None = None

    def __enter__(self) -> Engine:
        with open(self.log, "wb") as log:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._environment,
                start_new_session=True,  # a process group of its own, which can be ended as a whole
            )
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        assert self._process is not None
        worker.end_group(self._process.pid, grace=5.0)
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGKILL)
        self._process.wait()
        if error is None:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _ask(self) -> bool:
        """Writes another request for the engine, where it can use one; returns whether it did."""
        if not self._more or (self.pictures and self._asked >= self._enough):
            return False
        request = next(self._requests, None)
        self._more = request is not None
        self._asked += len(request["prompts"]) if request else 0
        with open(self.folder / "requests.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(request or {"end": True}) + "\n")
        return self._more

    def _note(self, event: dict[str, Any]) -> None:
        """Takes from an event how many prompts the engine can use, and which pictures it needs no longer."""
        if event["event"] == "ready":
            self._enough = 3 * event["at_once"]  # it takes more where fewer than twice as many wait
        if event["event"] == "chunk" and self.pictures:
            self._asked -= len(event["ids"])
            shutil.rmtree(self.pictures / str(event["index"]), ignore_errors=True)

    def events(self, pulse: Callable[[], None]) -> Iterator[dict[str, Any]]:
        """Yields what the engine tells, until it is done.

        Args:
            pulse: Called several times a second while there is nothing to tell; may raise to stop.

        Raises:
            EngineError: It died, hung, or wrote what it should not; with the last lines of its log.
        """
        assert self._process is not None
        ready, moved, size = False, time.monotonic(), 0
        with open(self._events, "rb") as file:
            while True:
                ended = self._process.poll() is not None  # asked first: what it wrote before is then read below
                for event in self._read(file):
                    moved = time.monotonic()
                    ready = ready or event["event"] == "ready"
                    self._note(event)
                    if event["event"] == "done":
                        self._let_go()
                        return
                    yield event
                if ended:
                    raise EngineError(self.failure(f"ended with {_status(self._process.returncode)}"))
                if not ready and self.log.stat().st_size != size:  # while it starts, its log is all that moves
                    size, moved = self.log.stat().st_size, time.monotonic()
                if time.monotonic() - moved > self.stall_seconds:
                    what = "answering" if ready else "starting"
                    raise EngineError(
                        self.failure(
                            f"made no progress for {self.stall_seconds:g} s while {what}; "
                            f"`{KEY}.stall_seconds` sets how long it may take"
                        )
                    )
                pulse()
                if self._ask():
                    moved = time.monotonic()  # it had to wait for that
                else:
                    time.sleep(0.1)

    def _read(self, file: IO[bytes]) -> Iterator[dict[str, Any]]:
        """Yields the events in the lines that are complete."""
        while True:
            position = file.tell()
            line = file.readline()
            if not line.endswith(b"\n"):
                file.seek(position)
                return
            try:
                event = json.loads(line)
                if not isinstance(event, dict) or not isinstance(event.get("event"), str):
                    raise ValueError("not an event")
            except ValueError as error:
                raise EngineError(self.failure(f"wrote garbage to {self._events} ({line[:80]!r})")) from error
            yield event

    def _let_go(self, seconds: float = 60.0) -> None:
        """Gives the engine time to end by itself; what is left of it then is killed."""
        assert self._process is not None
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=seconds)

    def failure(self, what: str) -> str:
        """Returns a message about a failure: what happened, advice, the last lines of the log, and its path."""
        with open(self.log, "rb") as log:
            said = log_tail(log)
        advice = "".join(f"\n{help}" for signs, help in _ADVICE if any(sign in said for sign in signs))
        return (
            f"the vLLM engine {what}{advice}\nthe end of its log, {self.log}:\n{said}\n"
            "finished answers are kept: the same command goes on from them"
        )


def _status(code: int) -> str:
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"


def log_tail(log: IO[bytes], lines: int = 20) -> str:
    """Returns the last lines of a log, whatever is in it."""
    size = log.seek(0, os.SEEK_END)
    log.seek(max(0, size - 20_000))
    text = log.read().decode(errors="replace")
    printable = "".join(letter if letter.isprintable() or letter == "\n" else " " for letter in text)
    last = [line.strip()[:300] for line in printable.splitlines() if line.strip()]
    return "\n".join(f"  | {line}" for line in last[-lines:]) or "  (nothing)"
