"""The command `axolotl spin export`: an iteration's pairs as a dataset for other programs, or for `spin.initial_pairs`."""

from __future__ import annotations

import secrets
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import click
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from axolotl_spin.commands.export.formats import SCHEMAS, UNREAD, Row, rows_of
from axolotl_spin.commands.export.pictures import PicturedRows, pictured_schema
from axolotl_spin.data.initial_pairs import PAIRS_FILE
from axolotl_spin.data.pairs import PICTURED, SCHEMA
from axolotl_spin.disk.atomic import publish_folder
from axolotl_spin.disk.directory import ForeignFolderError, RunDirectory, check_own

Inexact = Literal["refuse", "drop", "keep"]

# rows that are tokenised, and held as Python objects, at once; with their pictures
_ROWS, _PICTURED_ROWS = 1000, 50


# beside the run's `chat_template`
_VISION = "processor_type: AutoProcessor\nremove_unused_columns: false  # with Axolotl 0.21 or later"


@dataclass
class Tally:
    """What became of the rows.

    Attributes:
        written: In the exported set.
        faults: What the format does not keep of rows, and of how many; the same rows that `inexact` decides on.
        unwritable: Rows that cannot be written at all.
        first: The first row with a fault.
    """

    written: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    unwritable: int = 0
    first: int = -1

    def describe(self) -> str:
        """Returns a line for each fault."""
        return "\n".join(f"  {count}: {fault}" for fault, count in self.faults.most_common())


@dataclass(frozen=True)
class Export:
    """What is asked for.

    Attributes:
        output_dir: The run's.
        iteration: Whose pairs.
        kind: `parquet`, or one of `formats.SCHEMAS`.
        output: The folder to make.
        inexact: What happens to rows that the format cannot keep token for token.
        only_new: Leave out pairs kept from earlier iterations.
        test_rows: So many rows at the end go to `test.parquet`.
        tokenizer: Path or name of one with the run's chat template; empty for that in `output_dir`.
        trust_remote_code: Whether code that the tokenizer brings may run.
        config: The run's YAML, from whose data pictures are read again; None for a run on text.
    """

    output_dir: Path
    iteration: int
    kind: str
    output: Path
    inexact: Inexact = "refuse"
    only_new: bool = False
    test_rows: int = 0
    tokenizer: str = ""
    trust_remote_code: bool = False
    config: str | None = None


def export_pairs(asked: Export) -> Tally:
    """Writes an iteration's pairs as a folder that appears whole, and says how to use it.

    Raises:
        click.ClickException: There are no such pairs, or they cannot be written as asked.
    """
    directory, output = RunDirectory(asked.output_dir), asked.output.absolute()
    path = directory.pairs(asked.iteration)
    try:
        check_own(directory)
    except ForeignFolderError as error:
        raise click.ClickException(str(error)) from error
    if not path.exists():
        names = (
            pairs.parent.name.removeprefix("iteration-") for pairs in directory.root.glob("iteration-*/pairs.parquet")
        )
        found = sorted(int(name) for name in names if name.isdecimal())
        there = f": --iteration can be {', '.join(map(str, found))}" if found else " (nor pairs of another iteration)"
        raise click.ClickException(f"there is no {path}{there}")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise click.ClickException(f"--output {asked.output} is there already: name a new folder, or an empty one")
    if asked.kind == "parquet" and asked.test_rows:
        raise click.ClickException(
            "--test-rows splits datasets of messages and text; --format parquet is a single file"
        )
    aside = output.with_name(f".{output.name}.{secrets.token_hex(4)}")
    tally = Tally()
    try:
        aside.mkdir(parents=True)
        _write(aside, asked, _schema(path, asked), _read(path, asked), tally)
        if output.exists():
            output.rmdir()  # empty
        publish_folder(aside, output)
    except (ValueError, OSError, pa.ArrowException) as error:
        raise click.ClickException(str(error)) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return tally


def _schema(path: Path, asked: Export) -> pa.Schema:
    """Returns the columns that are written.

    Raises:
        ValueError: The file has other columns than pairs have, pictures that the format would lose, or options that do not
            go with them.
    """
    found = pq.read_schema(path)
    if found not in (SCHEMA, PICTURED):
        raise ValueError(f"{path} does not hold the columns of a pairs file")
    pictured = found == PICTURED
    if asked.test_rows and not asked.only_new and (kept := _kept(path, asked.iteration)):
        raise ValueError(
            f"the last {kept} pairs of {path} were kept from earlier iterations, and their prompts and human answers stand "
            f"among the others too: --test-rows {asked.test_rows} would split off what is trained on; add --only-new"
        )
    if asked.config and not (pictured and asked.kind == "dpo"):
        raise ValueError("--config is for --format dpo of a run on pictures: leave it out")
    if asked.kind == "parquet":
        return found.remove_metadata()
    if not pictured:
        return SCHEMAS[asked.kind]
    why = f"{path} holds pairs of prompts with pictures, which are not in the file"
    if asked.kind != "dpo":
        raise ValueError(
            f"{why}, and --format {asked.kind} is text alone, without a place for them: --format dpo has them beside its "
            "messages, --format parquet keeps tokens and the pictures' hashes"
        )
    if not asked.config:
        raise ValueError(
            f"{why}: name the run's YAML with --config, and they are read again from its `datasets:`; or --format parquet "
            "keeps tokens and the pictures' hashes"
        )
    if asked.tokenizer:
        raise ValueError("--tokenizer does not go with pictures, whose processor is that of --config: leave it out")
    return pictured_schema()


def _kept(path: Path, iteration: int) -> int:
    made_in = pq.read_table(path, columns=["generated_in"])["generated_in"]
    return pc.sum(pc.not_equal(made_in, iteration)).as_py() or 0


def _read(path: Path, asked: Export) -> Iterator[pa.RecordBatch]:
    with pq.ParquetFile(path, page_checksum_verification=True, pre_buffer=False) as file:
        for batch in file.iter_batches(_PICTURED_ROWS if asked.config else _ROWS):
            batch = batch.replace_schema_metadata(None)
            yield batch.filter(pc.equal(batch["generated_in"], asked.iteration)) if asked.only_new else batch


def _write(folder: Path, asked: Export, schema: pa.Schema, pairs: Iterator[pa.RecordBatch], tally: Tally) -> None:
    """Writes the folder's files; the last rows are held back for `test.parquet`."""
    raw = asked.kind == "parquet"
    made = _counted(pairs, tally) if raw else _converted(pairs, asked, tally, schema)
    held = schema.empty_table()
    with pq.ParquetWriter(folder / (PAIRS_FILE if raw else "train.parquet"), schema, write_page_checksum=True) as file:
        for batch in made:
            held = pa.concat_tables([held, pa.Table.from_batches([batch])])
            if (surplus := held.num_rows - asked.test_rows) > 0:
                file.write_table(held.slice(0, surplus))
                held = held.slice(surplus)
    inexact = sum(tally.faults.values())
    if inexact and asked.inexact == "refuse":
        raise ValueError(
            f"{inexact} of {tally.written + tally.unwritable} pairs cannot be kept token for token by --format "
            f"{asked.kind} (the first is row {tally.first}):\n{tally.describe()}\n"
            "use --format parquet, which keeps tokens; or leave such pairs out with --inexact drop, or write them as they "
            "read with --inexact keep"
        )
    if asked.inexact == "keep" and tally.unwritable:
        raise ValueError(
            f"{tally.unwritable} pairs cannot be written at all, since {UNREAD}: leave such pairs out with --inexact "
            "drop, or name the tokenizer that the run used with --tokenizer"
        )
    if not tally.written:
        raise ValueError("no pair is left to write")
    if tally.written <= asked.test_rows:
        raise ValueError(
            f"{tally.written} pairs are left to write, so --test-rows {asked.test_rows} leaves none to train on"
        )
    if asked.test_rows:
        pq.write_table(held, folder / "test.parquet", write_page_checksum=True)


def _counted(pairs: Iterator[pa.RecordBatch], tally: Tally) -> Iterator[pa.RecordBatch]:
    for batch in pairs:
        tally.written += len(batch)
        yield batch


def _converted(
    pairs: Iterator[pa.RecordBatch], asked: Export, tally: Tally, schema: pa.Schema
) -> Iterator[pa.RecordBatch]:
    convert, index = _converter(asked), 0
    for batch in pairs:
        rows = []
        for row in convert(batch):
            if row.fault:
                tally.faults[row.fault] += 1
                tally.first = index if tally.first < 0 else tally.first
            tally.unwritable += row.values is None
            if row.values is not None and not (row.fault and asked.inexact == "drop"):
                rows.append(row.values)
            index += 1
        tally.written += len(rows)
        yield pa.RecordBatch.from_pylist(rows, schema=schema)


def _converter(asked: Export) -> Callable[[pa.RecordBatch], list[Row]]:
    if asked.config:
        return PicturedRows(asked.config).rows_of
    tokenizer = _tokenizer(asked)
    return lambda batch: rows_of(batch, asked.kind, tokenizer)


def _tokenizer(asked: Export) -> Any:
    from transformers import AutoTokenizer

    name = asked.tokenizer or str(asked.output_dir)
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=asked.trust_remote_code)
    except (OSError, ValueError) as error:
        if "trust_remote_code" in str(error):
            raise ValueError(
                f"the tokenizer of {name} is code that it brings along: look at it, and if you trust it add "
                "--trust-remote-code"
            ) from error
        raise ValueError(f"no tokenizer is in {name} ({error}): name the model's with --tokenizer") from error


def describe(asked: Export, tally: Tally) -> list[str]:
    """Returns lines that say what was written and how to read it.

    Args:
        asked: What was asked for.
        tally: What became of the rows.
    """
    lines = [f"{asked.output}: {tally.written} pairs of iteration {asked.iteration}, --format {asked.kind}"]
    if tally.faults:
        done = "left out" if asked.inexact == "drop" else "written as they read, though inexact"
        lines.append(f"{sum(tally.faults.values())} pairs are {done}:\n{tally.describe()}")
    start = f"spin:\n  initial_pairs: {asked.output}"
    entry = f"datasets:\n  - path: {asked.output}\n    split: train"
    dpo = f"rl: dpo\n{entry}\n    type: chat_template.default\n    field_messages: prompt"
    how = {
        "parquet": start,
        "uclaml": f"{start}\nor, to have the prompts answered anew,\n{entry}\n    type: axolotl_spin.uclaml",
        "dpo": f"{_VISION}\n{dpo}" if asked.config else dpo,
        "dpo-text": f"rl: dpo\n{entry}",
    }
    return [*lines, "in a config:", how[asked.kind]]
