"""Thumbnails beside the answers: which pictures the page shows, and where a run has left small copies of them."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from axolotl_spin.report.answers import Sample
from axolotl_spin.report.reading import RunData

# pictures of a prompt, pictures in all, and bytes of them
EACH, MOST, BYTES = 4, 500, 1_500_000

# a hash, as pairs have it under `images`, and a JPEG
THUMBNAILS = pa.schema([("image", pa.string()), ("jpeg", pa.binary())])


def shown_pictures(prompts: Sequence[dict[str, Any]]) -> dict[str, tuple[int, int]]:
    """Returns which pictures the page shows: hashes, with the source row and the place in it where each is found.

    Args:
        prompts: Those of the page, with `row` and, where they have pictures, `images`. Where these are too many, every
            second prompt goes without.
    """
    prompts = [prompt for prompt in prompts if prompt.get("images")]
    while True:
        found: dict[str, tuple[int, int]] = {}
        for prompt in prompts:
            for place, name in enumerate(prompt["images"][:EACH]):
                found.setdefault(name, (prompt["row"], place))
        if len(found) <= MOST:
            return found
        prompts = prompts[::2]


def add_pictures(made: Sample, runs: Sequence[RunData]) -> None:
    """Adds to a page's prompts what thumbnails the runs have left of their pictures; nothing where there are none.

    A file that cannot be read is named in its run's notes.
    """
    shown = shown_pictures(made.prompts)
    size = 0
    for run in runs if shown else ():
        path = run.directory.thumbnails
        try:
            rows = pq.read_table(path, schema=THUMBNAILS, page_checksum_verification=True).to_pylist()
        except FileNotFoundError:
            continue
        except (pa.ArrowException, OSError) as error:
            run.notes.append(f"{path} is damaged ({str(error).splitlines()[0]}): pictures are left out.")
            continue
        for row in rows:
            if row["image"] in shown and row["image"] not in made.pictures and size + len(row["jpeg"]) <= BYTES:
                size += len(row["jpeg"])
                made.pictures[row["image"]] = f"data:image/jpeg;base64,{base64.b64encode(row['jpeg']).decode()}"
