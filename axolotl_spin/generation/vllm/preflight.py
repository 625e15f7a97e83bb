"""Whether a Python environment can run the vLLM engine: asked before a model is loaded, in seconds."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from axolotl_spin.generation.vllm.engine import KEY, WORKER, environment, interpreter, log_tail

# minor versions of vLLM whose interfaces the worker speaks, from the first up to, not including, the second
VERSIONS = ((0, 28), (0, 33))


def check_environment(
    python: str | None, engine: dict[str, Any], *, check_model: bool, needs_gpu: bool, timeout: float = 600
) -> str:
    """Checks that an environment can run an engine, without loading weights.

    Args:
        python: The `spin.generation.vllm.python`.
        engine: Arguments of `vllm.EngineArgs`.
        check_model: Whether `engine["model"]` is what will be served, or has its architecture.
        needs_gpu: Training runs on a GPU, so the engine should too.
        timeout: Seconds.

    Returns:
        vLLM's version.

    Raises:
        ValueError: It cannot; names the key to change.
    """
    program = interpreter(python)
    with tempfile.TemporaryDirectory(prefix="axolotl-spin-") as folder:
        job, report, log_path = (Path(folder) / name for name in ("job.json", "report.json", "log"))
        asked = {"parent": os.getpid(), "engine": engine, "versions": VERSIONS, "check_model": check_model}
        job.write_text(json.dumps({**asked, "report": str(report)}))
        with open(log_path, "w+b") as log:
            try:
                done = subprocess.run(
                    [program, str(WORKER), "check", str(job)],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=environment(program, {}),
                    timeout=timeout,
                )
            except (OSError, subprocess.TimeoutExpired) as error:
                raise ValueError(f"`{KEY}.python: {program}` did not run: {error}\n{log_tail(log)}") from error
            if done.returncode or not report.exists():
                raise ValueError(
                    f"`{KEY}.python: {program}` could not be asked about vLLM (exit status {done.returncode}). It said:\n"
                    f"{log_tail(log)}"
                )
        found = json.loads(report.read_text())
    if problem := explain(found, program, needs_gpu):
        raise ValueError(problem)
    return found["version"]


def explain(report: dict[str, Any], program: str, needs_gpu: bool) -> str | None:
    """Returns what a check found wrong, in the user's terms; None where all is well.

    Args:
        report: What `worker.check` returned.
        program: The interpreter that was asked.
        needs_gpu: Training runs on a GPU.
    """
    first, end = (".".join(map(str, version)) for version in VERSIONS)
    version, message = report.get("version"), report.get("message", "")
    problem = report.get("problem")
    if problem == "module":
        return (
            f"`spin.generation.backend: vllm`: vLLM cannot be imported by {program} ({message}): install it there "
            f"(`{program} -m pip install vllm`), or give another environment's Python as `{KEY}.python`"
        )
    if problem == "version":
        return (
            f"`{KEY}.python: {program}` has vLLM {version}; versions from {first} up to, not including, {end} work: "
            "install one of them there, or give another environment's Python"
        )
    if problem == "device":
        return (
            f"`spin.generation.backend: vllm`: {message} (vLLM {version} of {program}): run on a machine with a GPU, "
            "install vLLM's build for this machine, or set `spin.generation.backend: transformers`"
        )
    if problem == "argument":
        return f"`{KEY}`: {message}"
    if problem == "model" and "Unknown quantization method: bitsandbytes" in message:
        return (
            f"`load_in_4bit: true`: vLLM {version} of {program} needs a package of its own to quantize with bitsandbytes: "
            f"install it there (`{program} -m pip install vllm-bnb-plugin`), or set `spin.generation.backend: transformers`"
        )
    if problem == "model":
        return (
            f"vLLM {version} does not take this model or these arguments of `{KEY}`: {message}\n"
            "change them, or set `spin.generation.backend: transformers`"
        )
    if needs_gpu and report.get("device") == "cpu":
        return (
            f"`{KEY}.python: {program}` has a build of vLLM {version} for CPUs, while training runs on a GPU: give an "
            "environment's Python whose vLLM runs on the GPU"
        )
    return None
