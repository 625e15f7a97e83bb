"""Thumbnails beside the answers: a run leaves them for what its report shows, and the page has them and no more."""

from __future__ import annotations

import base64
import io
import json
import shutil
from pathlib import Path
from typing import Any

import finished
import host
import pictured
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from PIL import Image
from test_report_browser import ask, browser, show
from warm import Warm

from axolotl_spin.cli import spin
from axolotl_spin.data.pairs import PICTURED
from axolotl_spin.disk.directory import RunDirectory
from axolotl_spin.report.answers import Sample, read_answers, sample
from axolotl_spin.report.pictures import BYTES, EACH, MOST, THUMBNAILS, add_pictures, shown_pictures
from axolotl_spin.report.reading import read_run

__all__ = ["browser"]  # a fixture


def thumbnails(out: Path) -> dict[str, bytes]:
    rows = pq.read_table(RunDirectory(out).thumbnails).to_pylist()
    return {row["image"]: row["jpeg"] for row in rows}


def in_page(out: Path) -> dict[str, Any]:
    """Makes the page, and returns its pairs."""
    done = CliRunner().invoke(spin, ["report", str(out)])
    assert done.exit_code == 0, done.output
    text = RunDirectory(out).report.read_text()
    start = text.index('id="data">') + len('id="data">')
    return json.loads(text[start : text.index("</script>", start)])["pairs"]


@pytest.mark.host
def test_a_run_leaves_thumbnails_of_what_its_report_shows(tmp_path: Path, warm: Warm) -> None:
    """Each is of its own picture; a start on a finished iteration makes none again, but those that are missing."""
    pictured.conversations(tmp_path / "data.parquet", 12, mixed=True)
    settings = pictured.settings("gemma3", tmp_path, micro_batch_size=4)
    settings["spin"] |= {"iterations": 1}
    out = host.train(settings, by=warm).out
    shown = {name: picture for talk in pictured.messages_of(tmp_path) for name, picture in pictures_of(talk)}
    page, left = in_page(out), thumbnails(out)
    assert len(left) == 12 and left.keys() == shown.keys() == page["pictures"].keys()
    for name, jpeg in left.items():
        assert page["pictures"][name] == "data:image/jpeg;base64," + base64.b64encode(jpeg).decode()
        image = Image.open(io.BytesIO(jpeg))
        off = [
            abs(one - other) for one, other in zip(image.getpixel((5, 5)), shown[name].getpixel((5, 5)), strict=True)
        ]
        assert image.size == shown[name].size and max(off) < 4
    assert sorted(len(prompt.get("images", [])) for prompt in page["prompts"]) == [0] * 4 + [1] * 4 + [2] * 4
    # one is lost, and a second iteration is asked for
    path = RunDirectory(out).thumbnails
    lost, *kept = left.items()
    mark = (kept[0][0], b"kept as it is")
    pq.write_table(pa.Table.from_pylist([{"image": n, "jpeg": j} for n, j in [mark, *kept[1:]]], THUMBNAILS), path)
    settings["spin"] |= {"iterations": 2}
    assert "going on from" in host.train(settings, by=warm).output
    assert thumbnails(out) == {**left, mark[0]: mark[1]} and lost[0] in left


def pictures_of(talk: list[dict[str, Any]]) -> list[tuple[str, Any]]:
    images = [part["image"] for turn in talk for part in turn["content"] if part["type"] == "image"]
    return list(zip(pictured.shown(talk), images, strict=True))


def make(out: Path, images: dict[int, list[str]], jpegs: dict[str, bytes]) -> None:
    """Makes the folder of a run on pictures.

    Args:
        out: The run's.
        images: By prompt.
        jpegs: What the run has left.
    """
    finished.make(out, iterations=1)
    path = RunDirectory(out).pairs(0)
    table = pq.read_table(path)
    column = pa.array([images.get(row, []) for row in table["row"].to_pylist()], PICTURED.field("images").type)
    pq.write_table(table.append_column("images", column), path, write_page_checksum=True)
    rows = [{"image": name, "jpeg": jpeg} for name, jpeg in jpegs.items()]
    pq.write_table(pa.Table.from_pylist(rows, THUMBNAILS), RunDirectory(out).thumbnails, write_page_checksum=True)


def jpeg(colour: str, size: tuple[int, int] = (96, 48)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, "JPEG")
    return file.getvalue()


@pytest.mark.once
def test_the_page_in_a_browser(browser: Any, tmp_path: Path) -> None:
    """Decoded, no larger than they are, with words for who cannot see them; of what is not there, the number."""
    names = [f"h{i}" for i in range(EACH + 2)]
    make(
        tmp_path,
        {3: ["red", "blue"], 4: ["red"], 5: names, 6: ["gone"]},
        {n: jpeg(n) for n in ("red", "blue")} | dict.fromkeys(names[:EACH], jpeg("green")),
    )
    in_page(tmp_path)
    show(browser, RunDirectory(tmp_path).report)
    for _ in range(2):  # twenty at a time
        if browser.find_element("id", "more").is_displayed():
            browser.find_element("id", "more").click()
    found = ask(
        browser,
        """Promise.all([...document.querySelectorAll('.pictures img')].map(async (image) => {
             image.loading = 'eager'; await image.decode();
             const box = image.getBoundingClientRect();
             const n = image.closest('.pair').dataset.n;
             return [image.alt, image.naturalWidth, image.naturalHeight, Math.round(box.width) <= 96, n];
           }))""",
    )
    assert found[:3] == [
        ["picture 1 of 2 of prompt 3", 96, 48, True, "3"],
        ["picture 2 of 2 of prompt 3", 96, 48, True, "3"],
        ["picture 1 of 1 of prompt 4", 96, 48, True, "4"],
    ]
    assert [one[0] for one in found[3:]] == [f"picture {i + 1} of 6 of prompt 5" for i in range(EACH)]
    said = ask(browser, "[...document.querySelectorAll('.pictures .muted')].map((one) => one.textContent)")
    assert said == ["2 more pictures, not in this page", "1 picture, not in this page"]
    assert browser.get_log("browser") == []
    assert ask(browser, "document.querySelectorAll('.pair .pictures').length") == 4


@pytest.mark.once
def test_what_is_shown_has_limits(tmp_path: Path) -> None:
    """The first few of a prompt; of too many prompts every second; and a page's bytes, whatever the file holds."""
    few = [{"row": 7, "images": list("abcdef")}, {"row": 8}, {"row": 9, "images": ["a", "z"]}]
    assert shown_pictures(few) == {**{name: (7, place) for place, name in enumerate("abcd")}, "z": (9, 1)}
    many = [{"row": row, "images": [f"{row}"]} for row in range(MOST + 10)]
    assert list(shown_pictures(many)) == [f"{row}" for row in range(0, MOST + 10, 2)]
    big = bytes(BYTES // 2 - 10)
    make(tmp_path, {i: [f"{i}"] for i in range(4)}, {f"{i}": big for i in range(4)})
    run = read_run(tmp_path)
    made = sample([read_answers(run)])
    add_pictures(made, [run])
    assert len(made.pictures) == 2 and run.notes == []


@pytest.mark.once
def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    make(tmp_path, {0: ["red"]}, {"red": jpeg("red")})
    path = RunDirectory(tmp_path).thumbnails
    path.write_bytes(path.read_bytes()[:-9])
    assert in_page(tmp_path)["pictures"] == {}
    assert "thumbnails.parquet is damaged" in RunDirectory(tmp_path).report.read_text()


@pytest.mark.once
def test_runs_are_compared_with_the_pictures_of_either(tmp_path: Path) -> None:
    """The same prompts with one run's thumbnails, the other's being gone; a run on text has none."""
    for name in ("one", "two"):
        make(tmp_path / name, {0: ["red"]}, {"red": jpeg("red")})
    shutil.move(RunDirectory(tmp_path / "one").thumbnails, tmp_path / "gone")
    runs = [read_run(tmp_path / name) for name in ("one", "two")]
    made = sample([read_answers(run) for run in runs])
    add_pictures(made, runs)
    assert list(made.pictures) == ["red"] and runs[0].notes == []
    text = Sample(prompts=[{"n": 0, "row": 0}])
    add_pictures(text, runs)
    assert text.pictures == {}
