"""Compares the objectives with each other and with continued SFT: a small real model, human-written data, three seeds.

    python tests/benchmarks/study.py [--folder FOLDER] [--seeds N] [--iterations N] [--prompts N] [--heldout N]
        [--arms sigmoid space ...] [--data TRAIN.jsonl HELDOUT.jsonl] [--results FILE] [--quick]

Every run is the host's command. An iteration takes fresh prompts. Continued SFT takes the prompts of all iterations, and as
many passes over them as come nearest to the tokens that self-play puts through the model (a forward pass counts once, a
backward pass twice). Models are measured by `answers.py`, all in the same way, and removed. What was measured is kept in
`--folder`, so that a study goes on where it was stopped. `--results` is the file of which `make docs` makes a table.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

sys.path.insert(1, str(Path(__file__).parents[1]))  # where the tests' `host` is

import run as bench
import workload

START = "start model"
SFT = "continued SFT"
# what each objective adds to the block; every other key is at its default or the same for all
ARMS: dict[str, dict[str, Any]] = {
    "sigmoid": {"loss": "sigmoid", "beta": 0.1},
    "space": {"loss": "space"},
    "length-normalised": {"loss": "sigmoid", "beta": 1.0, "length_normalized": True},
    "sigmoid, beta 1": {"loss": "sigmoid", "beta": 1.0},
}
ASKED = ["sigmoid", "space", "length-normalised"]
MOST_TOKENS = 32  # of an answer, people's and the model's
BATCH = 8
LEARNING_RATE = 5e-6


def main() -> None:
    """Runs what is missing and writes what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "axolotl-spin-study")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each arm (default: 3)")
    parser.add_argument("--iterations", type=int, default=3, help="of self-play (default: 3)")
    parser.add_argument("--prompts", type=int, default=64, help="new ones in each iteration (default: 64)")
    parser.add_argument("--heldout", type=int, default=64, help="rows to measure on (default: 64)")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ASKED, help=f"default: {', '.join(ASKED)}")
    parser.add_argument(
        "--data",
        nargs=2,
        type=Path,
        metavar=("TRAIN", "HELDOUT"),
        help="JSON lines with `messages` (default: Dolly's short open questions where they lie beside the checkout, "
        "else chatterbot-corpus); those whose answers are short enough are taken",
    )
    parser.add_argument("--learning-rate", type=float, default=LEARNING_RATE, help=f"default: {LEARNING_RATE}")
    parser.add_argument("--results", type=Path, help="JSON file to write")
    parser.add_argument("--quick", action="store_true", help="see that everything runs: one seed of the smallest size")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.seeds, arguments.iterations, arguments.prompts, arguments.heldout = 1, 2, 8, 8
    study = Study(arguments)
    rows = study.start()
    for seed in range(arguments.seeds):
        played = [row for arm in arguments.arms for row in study.played(arm, seed)]
        passes = sum(row["passes"] for row in played) / len(played)
        rows += [study.tuned(seed, passes), *played]
    report = {
        "date": date.today().isoformat(),
        "data": study.about,
        **{name: getattr(arguments, name) for name in ("seeds", "iterations", "prompts", "heldout", "learning_rate")},
        **bench.machine(),
        "rows": rows,
    }
    print(json.dumps(report, indent=1))
    if arguments.results:
        arguments.results.write_text(json.dumps(report, indent=1) + "\n")


class Study:
    """Runs arms in a folder, each figure once.

    Args:
        arguments: Of the command line.
    """

    def __init__(self, arguments: argparse.Namespace):
        self.arguments = arguments
        arguments.folder.mkdir(parents=True, exist_ok=True)
        workload.prepare(arguments.folder)
        self.model = arguments.folder / "smollm2"
        sizes = (arguments.iterations, arguments.prompts, arguments.heldout, arguments.learning_rate)
        self.folder = arguments.folder / "-".join(map(str, sizes))  # figures of another size are another study's
        self.folder.mkdir(parents=True, exist_ok=True)
        self.about = self._data(arguments.data)

    def _data(self, given: Sequence[Path] | None) -> str:
        """Writes `train.jsonl` and `heldout.jsonl`, and returns what they are."""
        from transformers import AutoTokenizer

        needed = self.arguments.prompts * self.arguments.iterations
        if given is None and workload.REAL.exists():
            given = [workload.REAL, workload.REAL.with_name(workload.REAL.name.replace("train", "heldout"))]
        if given is None:
            import prepare as quickstart

            quickstart.make_data(self.folder, needed, self.arguments.heldout, 2)
            return "chatterbot-corpus"
        tokenizer = AutoTokenizer.from_pretrained(self.model)
        for source, name, count in zip(given, ("train", "heldout"), (needed, self.arguments.heldout), strict=True):
            lines = source.read_text(encoding="utf-8").splitlines()
            answers = tokenizer([json.loads(line)["messages"][-1]["content"] for line in lines])["input_ids"]
            # and a token that ends it
            lines = [line for line, answer in zip(lines, answers, strict=True) if len(answer) < MOST_TOKENS]
            if len(lines) < count:
                sys.exit(
                    f"study.py: {source.name} has {len(lines)} rows with answers that short, and {count} are needed"
                )
            (self.folder / f"{name}.jsonl").write_text("\n".join(lines[:count]) + "\n", encoding="utf-8")
        return ", ".join(path.stem for path in given)

    def start(self) -> list[dict[str, Any]]:
        """Measures the model that every run starts from."""
        figures = self._known("start", lambda work: self._measured(work, [self.model]))
        return [{"arm": START, "seed": None, "iteration": None, **figures[0]}]

    def played(self, arm: str, seed: int) -> list[dict[str, Any]]:
        """Runs self-play with an arm's objective, and measures the model of each iteration."""

        def make(work: Path) -> list[dict[str, Any]]:
            spin = {
                "iterations": self.arguments.iterations,
                "history": 0,
                "prompts_per_iteration": self.arguments.prompts,
                "generation": {"max_new_tokens": MOST_TOKENS},
                **ARMS[arm],
            }
            seconds = self._train(work, seed, spin=spin, plugins=workload.OURS)
            models = [work / "out" / "spin" / f"iteration-{index}" / "model" for index in range(spin["iterations"])]
            passes = played_passes(work / "out")
            return [{**row, "seconds": seconds, "passes": passes} for row in self._measured(work, models)]

        name = f"{arm.replace(' ', '-').replace(',', '')}-{seed}"
        return [
            {"arm": arm, "seed": seed, "iteration": index, **row} for index, row in enumerate(self._known(name, make))
        ]

    def tuned(self, seed: int, passes: float) -> dict[str, Any]:
        """Runs continued SFT on the prompts of all iterations.

        Args:
            seed: Of the run.
            passes: Tokens that self-play put through the model.
        """
        epoch = self._sft_passes()
        epochs = max(1, round(passes / epoch))

        def make(work: Path) -> list[dict[str, Any]]:
            seconds = self._train(work, seed, rl=None, spin=None, plugins=None, num_epochs=epochs)
            return [
                {**row, "seconds": seconds, "passes": epochs * epoch} for row in self._measured(work, [work / "out"])
            ]

        return {"arm": SFT, "seed": seed, "iteration": None, **self._known(f"sft-{epochs}-{seed}", make)[0]}

    def _known(self, name: str, make: Any) -> list[dict[str, Any]]:
        kept = self.folder / f"{name}.json"
        if not kept.exists():
            work = self.folder / name
            shutil.rmtree(work, ignore_errors=True)
            begun = time.monotonic()
            rows = make(work)
            kept.write_text(json.dumps(rows, indent=1))
            shutil.rmtree(work, ignore_errors=True)
            print(f"{name}: {time.monotonic() - begun:.0f} s", file=sys.stderr, flush=True)
        return json.loads(kept.read_text())

    def _train(self, work: Path, seed: int, **changes: Any) -> float:
        """Runs the host's command and returns its seconds."""
        config = {
            **workload.settings(self.arguments.folder, "smollm2"),
            "datasets": [{"path": str(self.folder / "train.jsonl"), "ds_type": "json", "type": "chat_template"}],
            "dataset_prepared_path": str(self.folder / "prepared"),
            "micro_batch_size": BATCH,
            "learning_rate": self.arguments.learning_rate,
            "lr_scheduler": "linear",
            "warmup_steps": None,
            "warmup_ratio": 0.1,
            "seed": seed,
            "output_dir": str(work / "out"),
            **changes,
        }
        begun = time.monotonic()
        workload.run(work, config)
        return time.monotonic() - begun

    def _measured(self, work: Path, models: Sequence[Path]) -> list[dict[str, Any]]:
        work.mkdir(parents=True, exist_ok=True)
        result = work / "measured.json"
        script = str(Path(__file__).with_name("answers.py"))
        held_out = str(self.folder / "heldout.jsonl")
        workload.measured([script, held_out, str(MOST_TOKENS), str(result), *map(str, models)], result)
        return json.loads(result.read_text())

    def _sft_passes(self) -> int:
        """Returns the tokens that one epoch of SFT puts through the model."""
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(self.model)
        lines = (self.folder / "train.jsonl").read_text(encoding="utf-8").splitlines()
        texts = [tokenizer.apply_chat_template(json.loads(line)["messages"], return_dict=False) for line in lines]
        return 3 * sum(map(len, texts))


def played_passes(output: Path) -> int:
    """Returns the tokens that a run of self-play put through the model: answering, scoring, training.

    Args:
        output: The run's `output_dir`.
    """
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    found = 0
    for path in sorted((output / "spin").glob("iteration-*/pairs.parquet")):
        pairs = pq.read_table(path, columns=["prompt_ids", "chosen_ids", "rejected_ids"])
        prompt, chosen, rejected = (pc.sum(pc.list_value_length(pairs[name])).as_py() for name in pairs.column_names)
        # the prompt stands once before both answers, in scoring and in training
        found += (prompt + rejected) + 4 * (prompt + chosen + rejected)
    return found


if __name__ == "__main__":
    main()
