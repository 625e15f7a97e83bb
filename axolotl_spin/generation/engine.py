"""A vLLM engine as a process of its own: checked, started, followed through what it writes, and gone at the end.

`vllm_worker.py` is what runs there, possibly in another Python environment; JOB, which it reads, has these keys:

    parent     this process's number: the engine ends when it is gone
    engine     arguments of `vllm.EngineArgs`, by their names
    sampling   arguments of `vllm.SamplingParams` that hold for every request
    adapter    folder of a LoRA adapter, or null
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
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from axolotl_spin.generation import vllm_worker

# minor versions of vLLM whose interfaces the worker speaks, from the first up to, not including, the second
VERSIONS = ((0, 28), (0, 33))
_WORKER = Path(vllm_worker.__file__).absolute()
_KEY = "spin.generation.vllm"
# what a launcher says to its ranks means something else to vLLM
_LAUNCHER = (
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_"),
    *("ACCELERATE_", "FSDP_", "DS_", "DEEPSPEED_", "AXOLOTL_"),
)
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
        f"lower `{_KEY}.gpu_memory_utilization`, or set `{_KEY}.offload: true`",
    ),
    (
        ("No available memory for the cache blocks", "larger than the maximum number of tokens that can be stored"),
        f"raise `{_KEY}.gpu_memory_utilization`, lower `{_KEY}.max_model_len`, or set `{_KEY}.offload: true`",
    ),
    (
        ("out of memory", "OutOfMemoryError"),
        f"lower `{_KEY}.gpu_memory_utilization`, or `{_KEY}.max_num_seqs`, or set `{_KEY}.offload: true`",
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
            f"`{_KEY}.python: {python}` is no program that can be run: give the path of the Python in the environment "
            "where vLLM is installed, such as /opt/vllm/bin/python"
        )
    return found


def check_environment(
    python: str | None,
    engine: dict[str, Any],
    folder: Path,
    *,
    check_model: bool,
    needs_gpu: bool,
    timeout: float = 600,
) -> str:
    """Checks that an environment can run an engine, without loading weights: seconds, before anything expensive starts.

    Args:
        python: The `spin.generation.vllm.python`.
        engine: Arguments of `vllm.EngineArgs`.
        folder: For the check's files; removed afterwards.
        check_model: Whether `engine["model"]` is what will be served, or has its architecture.
        needs_gpu: Training runs on a GPU, so the engine should too.
        timeout: Seconds.

    Returns:
        vLLM's version.

    Raises:
        ValueError: It cannot; names the key to change.
    """
    program = interpreter(python)
    folder.mkdir(parents=True, exist_ok=True)
    job = {
        "parent": os.getpid(),
        "engine": engine,
        "versions": VERSIONS,
        "check_model": check_model,
        "report": str(folder / "report.json"),
    }
    try:
        path = folder / "check.json"
        path.write_text(json.dumps(job))
        with open(folder / "check.log", "w+b") as log:
            try:
                done = subprocess.run(
                    [program, str(_WORKER), "check", str(path)],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=environment(program, {}),
                    timeout=timeout,
                )
            except (OSError, subprocess.TimeoutExpired) as error:
                raise ValueError(f"`{_KEY}.python: {program}` did not run: {error}\n{_tail(log)}") from error
            if done.returncode or not (folder / "report.json").exists():
                raise ValueError(
                    f"`{_KEY}.python: {program}` could not be asked about vLLM (exit status {done.returncode}). It said:\n"
                    f"{_tail(log)}"
                )
        report = json.loads((folder / "report.json").read_text())
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if problem := explain(report, program, needs_gpu):
        raise ValueError(problem)
    return report["version"]


def explain(report: dict[str, Any], program: str, needs_gpu: bool) -> str | None:
    """Returns what a check found wrong, in the user's terms; None where all is well.

    Args:
        report: What `vllm_worker.check` returned.
        program: The interpreter that was asked.
        needs_gpu: Training runs on a GPU.
    """
    first, end = (".".join(map(str, version)) for version in VERSIONS)
    version, message = report.get("version"), report.get("message", "")
    problem = report.get("problem")
    if problem == "module":
        return (
            f"`spin.generation.backend: vllm`: vLLM cannot be imported by {program} ({message}): install it there "
            f"(`{program} -m pip install vllm`), or give another environment's Python as `{_KEY}.python`"
        )
    if problem == "version":
        return (
            f"`{_KEY}.python: {program}` has vLLM {version}; versions from {first} up to, not including, {end} work: "
            "install one of them there, or give another environment's Python"
        )
    if problem == "device":
        return (
            f"`spin.generation.backend: vllm`: {message} (vLLM {version} of {program}): run on a machine with a GPU, "
            "install vLLM's build for this machine, or set `spin.generation.backend: transformers`"
        )
    if problem == "argument":
        return f"`{_KEY}`: {message}"
    if problem == "model":
        return (
            f"vLLM {version} does not take this model or these arguments of `{_KEY}`: {message}\n"
            "change them, or set `spin.generation.backend: transformers`"
        )
    if needs_gpu and report.get("device") == "cpu":
        return (
            f"`{_KEY}.python: {program}` has a build of vLLM {version} for CPUs, while training runs on a GPU: give an "
            "environment's Python whose vLLM runs on the GPU"
        )
    return None


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
    # one process where one suffices: nothing that could outlive it, and a start without importing everything twice
    kept.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    return {**kept, **_FIXED, **changes}


class Engine:
    """A running engine; a context at whose end its processes are gone.

    Args:
        python: The `spin.generation.vllm.python`.
        folder: For its files: requests, events, log. Left where it fails, removed where it does not.
        job: `engine`, `sampling` and `adapter` of the job.
        requests: What it is to answer, a JSON line each; see `vllm_worker`.
        changes: Environment variables set for it.
        stall_seconds: How long it may go without progress.
    """

    def __init__(
        self,
        python: str | None,
        folder: Path,
        job: dict[str, Any],
        requests: Iterator[dict[str, Any]],
        changes: dict[str, str],
        stall_seconds: float,
    ):
        self.folder, self.stall_seconds = folder, stall_seconds
        self.log = folder / "engine.log"
        self._events = folder / "events.jsonl"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        with open(folder / "requests.jsonl", "w", encoding="utf-8") as file:
            for request in requests:
                file.write(json.dumps(request) + "\n")
        self._events.touch()
        files = {"requests": str(folder / "requests.jsonl"), "events": str(self._events)}
        job_path = folder / "job.json"
        job_path.write_text(json.dumps({"parent": os.getpid(), **job, **files}))
        program = interpreter(python)
        self._command = [program, str(_WORKER), "answer", str(job_path)]
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
        vllm_worker.end_group(self._process.pid, grace=5.0)
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGKILL)
        self._process.wait()
        if error is None:
            shutil.rmtree(self.folder, ignore_errors=True)

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
                            f"`{_KEY}.stall_seconds` sets how long it may take"
                        )
                    )
                pulse()
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
            said = _tail(log)
        advice = "".join(f"\n{help}" for signs, help in _ADVICE if any(sign in said for sign in signs))
        return (
            f"the vLLM engine {what}{advice}\nthe end of its log, {self.log}:\n{said}\n"
            "finished answers are kept: the same command goes on from them"
        )


def _status(code: int) -> str:
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"


def _tail(log: IO[bytes], lines: int = 20) -> str:
    """Returns the last lines of a log, whatever is in it."""
    size = log.seek(0, os.SEEK_END)
    log.seek(max(0, size - 20_000))
    text = log.read().decode(errors="replace")
    printable = "".join(letter if letter.isprintable() or letter == "\n" else " " for letter in text)
    last = [line.strip()[:300] for line in printable.splitlines() if line.strip()]
    return "\n".join(f"  | {line}" for line in last[-lines:]) or "  (nothing)"


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
            f"`{_KEY}.gpu_memory_utilization: {wanted:g}` is {wanted * total / 2**30:.1f} GiB of the GPU's "
            f"{total / 2**30:.1f}, and training leaves {free / 2**30:.1f} GiB free: set it to at most "
            f"{0.98 * free / total:.2f}, remove it, or set `{_KEY}.offload: true`"
        )
    return wanted


def visible_devices(first: int, count: int, variable: str | None) -> str:
    """Returns the `CUDA_VISIBLE_DEVICES` of an engine that has some of the GPUs that this process sees.

    Args:
        first: Number of the first GPU, as this process counts them.
        count: How many.
        variable: This process's own `CUDA_VISIBLE_DEVICES`.
    """
    names: Sequence[str] = variable.split(",") if variable else [str(number) for number in range(first + count)]
    return ",".join(names[first : first + count])
