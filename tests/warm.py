"""A process that has imported the host once and forks: a run of the host's command then starts at once.

A forked run is a process of its own: it has its own session, environment, standard streams and exit code, runs a module as
`python -m` does, and can be killed. Everything that it imports is what a fresh interpreter would import. A run on two ranks
is forked from two such processes, so that its ranks share no more than two interpreters do (their hashes differ, say).
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_IMPORTS = (
    "axolotl.cli.train",
    "axolotl.cli.config",
    "axolotl.cli.checks",
    "axolotl.train",
    "axolotl.core.builders",
    "axolotl.utils.data",
    "axolotl.prompt_strategies.chat_template",
    "axolotl_spin.plugin",
    "axolotl_spin.callbacks",
    "axolotl_spin.trainer",
    "axolotl_spin.run.resume",
    "axolotl_spin.args",
    "transformers.models.llama.modeling_llama",
    "transformers.models.auto.modeling_auto",
    "deepspeed",  # which accelerate imports in every run
)


def _serve() -> None:
    """Reads requests from standard input, a JSON object a line, and answers each with a line."""
    import gc
    import importlib

    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what imports print is not an answer
    for name in _IMPORTS:
        importlib.import_module(name)
    from accelerate.state import PartialState

    save_rows_here()
    assert not PartialState._shared_state  # each run makes its own, from its own environment
    gc.freeze()
    answers.write("ready\n")
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            status = os.waitpid(request["wait"], 0)[1]
            answers.write(f"{os.waitstatus_to_exitcode(status)}\n")
            continue
        child = os.fork()
        if child == 0:
            _run(request)
        answers.write(f"{child}\n")


def save_rows_here() -> None:
    """Has `datasets` write the rows that a host saves in the process that saves them.

    The host asks for one process, and `datasets` then starts an interpreter for it, which imports everything anew: two
    seconds of each preparation. The same is written. A command that is launched saves as the host has it.
    """
    from datasets import Dataset

    save: Any = Dataset.save_to_disk

    def saving(rows: Dataset, *arguments: Any, num_proc: int | None = None, **named: Any) -> None:
        save(rows, *arguments, num_proc=None if num_proc == 1 else num_proc, **named)

    Dataset.save_to_disk = saving


def _run(request: dict[str, Any]) -> None:
    code = 1
    try:
        os.setsid()
        os.environ.clear()
        os.environ.update(request["env"])
        path = os.environ.get("PYTHONPATH", "").split(os.pathsep)
        sys.path[:0] = [folder for folder in path if folder and folder not in sys.path]
        os.chdir(request["cwd"])
        log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(os.open(request["typed"] or os.devnull, os.O_RDONLY), 0)
        os.dup2(log, 1)
        os.dup2(os.open(request["errors"], os.O_WRONLY | os.O_CREAT | os.O_APPEND) if request["errors"] else log, 2)
        module, *arguments = request["module"]
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            _keep_process_groups()
        sys.argv = [module, *arguments]
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())  # as the interpreter does it
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _keep_process_groups() -> None:
    """Holds the process groups that this process will destroy, so that none of them is destructed before it ends.

    The host destroys its groups, lets go of the trainer and collects garbage. That destructs DDP's reducer, which by then
    has the last reference to its group. gloo's destructor waits for its threads while it holds the GIL, and a thread that
    has yet to free the tensor of a finished collective waits for the GIL: the process never ends, about once in a hundred
    runs. It is PyTorch's (2.13 and 2.14), of groups on CPUs alone, and comes when all of a run is done and saved.

    Groups are shut down as ever, and the process ends without destructors. What this would hide is a collective that is
    left unwaited for at a run's end and that never completes; our package starts none without waiting for it.
    """
    import torch
    from torch.distributed import distributed_c10d

    destroy, kept = torch.distributed.destroy_process_group, []

    def keeping(*arguments: Any, **named: Any) -> None:
        kept.extend(distributed_c10d._world.pg_map)
        destroy(*arguments, **named)

    torch.distributed.destroy_process_group = keeping


class Warm:
    """A warm process; use it as a context."""

    def __init__(self, env: dict[str, str]):
        self._env = {**env, "DS_ACCELERATOR": "cpu"}  # DeepSpeed reads it when it is imported

    def __enter__(self) -> Warm:
        self._server = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=self._env,
        )
        self._ready = False
        return self

    def __exit__(self, *_: object) -> None:
        self._server.kill()
        self._server.wait()

    def _ask(self, request: dict[str, Any]) -> int:
        assert self._server.stdin is not None and self._server.stdout is not None
        if not self._ready:
            assert self._server.stdout.readline() == "ready\n"
            self._ready = True
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        return int(self._server.stdout.readline())

    def start(
        self,
        *module: str,
        env: dict[str, str],
        cwd: Path,
        log: Path | None = None,
        errors: Path | None = None,
        typed: Path | None = None,
    ) -> Fork:
        """Starts a module in a fork.

        Args:
            module: The module's name and its arguments.
            env: Its whole environment.
            cwd: Its working folder.
            log: What it prints is appended to this file, or to one of its own.
            errors: What it prints to standard error is appended to this file instead.
            typed: What it reads from standard input is in this file.
        """
        log = log or cwd / f"warm-{time.monotonic_ns()}.log"
        files = {"cwd": str(cwd), "log": str(log), "errors": errors and str(errors), "typed": typed and str(typed)}
        request = {"module": module, "env": env, **files}
        return Fork(self, self._ask(request), log)

    def run(
        self,
        *module: str,
        env: dict[str, str],
        cwd: Path,
        timeout: float = 300,
        errors: Path | None = None,
        typed: Path | None = None,
    ) -> tuple[int, str]:
        """Runs a module in a fork, to its end.

        Args:
            module, env, cwd, errors, typed: See `start`.
            timeout: Seconds after which it counts as hung.

        Returns:
            Its exit code (negative: the signal that ended it) and what it printed.
        """
        fork = self.start(*module, env=env, cwd=cwd, errors=errors, typed=typed)
        code = fork.wait(timeout)
        return code, fork.output()


class Ranks:
    """Runs on several ranks of this machine, each forked from a warm process of its own."""

    def __init__(self, warm: Sequence[Warm]):
        self.warm = warm

    def start(self, *module: str, env: dict[str, str], cwd: Path | Sequence[Path], logs: Sequence[Path]) -> list[Fork]:
        """Starts a module on every rank; nothing watches over them.

        Args:
            module: The module's name and its arguments.
            env: The environment of each, to which the launcher's variables are added.
            cwd: The working folder; or one for each rank, which is then a node of its own.
            logs: What each rank's output is appended to.
        """
        count = str(len(self.warm))
        folders = [cwd] * len(self.warm) if isinstance(cwd, Path) else cwd
        here = count if isinstance(cwd, Path) else "1"
        with socket.socket() as listening:
            listening.bind(("localhost", 0))
            port = listening.getsockname()[1]
        shared = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": here, "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
        own = [{"RANK": str(rank), "LOCAL_RANK": str(rank % int(here))} for rank in range(len(self.warm))]
        return [
            warm.start(*module, env={**env, **shared, **own[rank]}, cwd=folders[rank], log=log)
            for rank, (warm, log) in enumerate(zip(self.warm, logs, strict=True))
        ]

    def run(
        self, *module: str, env: dict[str, str], cwd: Path | Sequence[Path], timeout: float = 300
    ) -> tuple[int, str]:
        """Runs a module on every rank, to the end of all; where one fails the others are ended, as torchrun does it.

        Args:
            module, env, cwd: See `start`.
            timeout: Seconds after which it counts as hung.

        Returns:
            The exit code of the rank that failed first, else 0, and what all printed.
        """
        log = (cwd if isinstance(cwd, Path) else cwd[0]) / f"warm-{time.monotonic_ns()}.log"
        forks = self.start(*module, env=env, cwd=cwd, logs=[log] * len(self.warm))
        limit = time.monotonic() + timeout
        codes: dict[int, int] = {}
        while len(codes) < len(forks) and not any(codes.values()):
            time.sleep(0.02)
            codes |= {rank: fork.wait() for rank, fork in enumerate(forks) if rank not in codes and not fork.alive()}
            if time.monotonic() > limit:
                for rank, fork in enumerate(forks):
                    if rank not in codes:
                        fork.end(signal.SIGKILL)
                raise AssertionError(f"hung: {forks[0].output()[-4000:]}")
        for rank, fork in enumerate(forks):
            if rank not in codes:
                fork.end(signal.SIGTERM)
        return next((code for code in codes.values() if code), 0), forks[0].output()


class Fork:
    """A run in a fork."""

    def __init__(self, warm: Warm, pid: int, log: Path):
        self._warm, self.pid, self._log = warm, pid, log

    def output(self) -> str:
        """Returns what it has printed."""
        return self._log.read_text(errors="replace") if self._log.exists() else ""

    def alive(self) -> bool:
        """Whether it still runs."""
        return _alive(self.pid)

    def end(self, by: signal.Signals) -> int:
        """Sends a signal, kills what has not ended half a minute later, and returns the exit code."""
        os.killpg(self.pid, by)
        limit = time.monotonic() + 30
        while self.alive() and time.monotonic() < limit:
            time.sleep(0.02)
        if self.alive():
            os.killpg(self.pid, signal.SIGKILL)
        return self._warm._ask({"wait": self.pid})

    def wait(self, timeout: float = 300) -> int:
        """Waits for its end and returns the exit code; after the time-out (in seconds) it is killed, and the test fails."""
        limit = time.monotonic() + timeout
        while self.alive():
            if time.monotonic() > limit:
                os.killpg(self.pid, signal.SIGKILL)
                raise AssertionError(f"hung: {self.output()[-4000:]}")
            time.sleep(0.02)
        return self._warm._ask({"wait": self.pid})


def _alive(child: int) -> bool:
    try:
        return Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


if __name__ == "__main__":
    _serve()
