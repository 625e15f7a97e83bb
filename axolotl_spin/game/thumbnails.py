"""Small copies of the pictures that the report shows, which has the run's folder alone to look at."""

from __future__ import annotations

import io
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from axolotl.utils.logging import get_logger

from axolotl_spin.data.images import picture_hash, pictures_of
from axolotl_spin.disk.atomic import write_whole
from axolotl_spin.report.answers import read_answers, sample
from axolotl_spin.report.pictures import BYTES, THUMBNAILS, shown_pictures
from axolotl_spin.report.reading import read_run
from axolotl_spin.run.prepare import SpinRun

LOG = get_logger(__name__)

# longest sides in pixels: the first with which all are small enough together
_SIDES = (96, 64, 48, 32)


def keep_thumbnails(run: SpinRun) -> None:
    """Writes `spin/thumbnails.parquet`: of the pictures beside the answers that a report made now would show.

    Those already there are kept, so that a resumed run makes none again. A failure is logged and leaves the run as it is.
    Call it on one rank, once an iteration's pairs are on disk.

    Args:
        run: On pictures.
    """
    path = run.directory.thumbnails
    try:
        # as a complete one, since asking whether it goes on would close its lock where that is a POSIX one
        wanted = shown_pictures(sample([read_answers(read_run(run.directory.root.parent, complete=True))]).prompts)
        kept = _read(path)
        made = {name: kept[name] for name in wanted if name in kept}
        if made.keys() == wanted.keys() == kept.keys():
            return
        assert run.images is not None
        rows = {row for name, (row, _) in wanted.items() if name not in kept}
        pictures = {
            name: image for row in sorted(rows) for name, image in _small(pictures_of(run.images.messages(row)))
        }
        missing = wanted.keys() - made.keys()
        made |= {name: _jpeg(image, _SIDES[0]) for name, image in pictures.items() if name in missing}
        for side in _SIDES[1:]:
            if sum(map(len, made.values())) <= BYTES:
                break
            made = {name: _jpeg(_opened(jpeg), side) for name, jpeg in made.items()}
        table = pa.table([list(made), list(made.values())], schema=THUMBNAILS)
        write_whole(path, lambda aside: pq.write_table(table, aside, write_page_checksum=True))
    except Exception as error:  # whatever it is, the run is worth more than its report's pictures
        LOG.warning(f"{path} could not be made ({type(error).__name__}: {error}): the report will lack pictures")


def _read(path: Any) -> dict[str, bytes]:
    try:
        rows = pq.read_table(path, schema=THUMBNAILS, page_checksum_verification=True).to_pylist()
    except (FileNotFoundError, pa.ArrowException, OSError):
        return {}
    return {row["image"]: row["jpeg"] for row in rows}


def _small(pictures: list[Any]) -> list[tuple[str, Any]]:
    """Returns pictures' hashes and small copies, so that the large ones need not be held together."""
    found = []
    for picture in pictures:
        name, small = picture_hash(picture), picture.convert("RGB")
        small.thumbnail((_SIDES[0], _SIDES[0]))
        found.append((name, small))
    return found


def _opened(jpeg: bytes) -> Any:
    from PIL import Image

    return Image.open(io.BytesIO(jpeg))


def _jpeg(image: Any, side: int) -> bytes:
    image = image.copy()
    image.thumbnail((side, side))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=80)
    return file.getvalue()
