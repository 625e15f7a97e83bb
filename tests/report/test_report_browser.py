"""`report.html` in a real browser, from disk and without a network."""

from __future__ import annotations

import base64
import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import finished
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from axolotl_spin.cli import spin
from axolotl_spin.disk.directory import RunDirectory
from axolotl_spin.report.answers import read_answers
from axolotl_spin.report.reading import read_run

pytestmark = pytest.mark.once

ODD = [
    "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 2'>",
    "<b>bold</b> </script hacked <!--<script &amp; `code` ]]> <!-- \u2028 \u0000 \x1b[31m \u202e rtl \U0001f600 \ufffe",
    "Needle " + "long " * 30_000,
    "",
]
PROMPTS = 50_000


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium without a window, its network off."""
    selenium = pytest.importorskip("selenium.webdriver")
    from selenium.webdriver.chrome.service import Service

    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    driver = shutil.which("chromedriver")
    if program is None or driver is None:
        reason = "no Chromium with its chromedriver was found here (Debian: apt-get install chromium chromium-driver)"
        if os.environ.get("SPIN_BROWSER") == "required":  # as the checks before a change lands say
            pytest.fail(reason)
        pytest.skip(reason)
    options = selenium.ChromeOptions()
    options.binary_location = program
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    started = selenium.Chrome(options=options, service=Service(driver))
    started.set_page_load_timeout(60)
    started.execute_cdp_cmd("Network.enable", {})
    offline = {"offline": True, "latency": 0, "downloadThroughput": 0, "uploadThroughput": 0}
    started.execute_cdp_cmd("Network.emulateNetworkConditions", offline)
    yield started
    started.quit()


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 50 thousand prompts, whose answers hold what breaks a page; the page is made by the command."""
    out = tmp_path_factory.mktemp("large") / "<i>run & co"
    finished.make(out, prompts=PROMPTS, words=40, odd=ODD)
    done = CliRunner().invoke(spin, ["report", str(out)])
    assert done.exit_code == 0, done.output
    return out


def show(browser: Any, page: Path, width: int = 1300, scheme: str = "light") -> None:
    """Opens a page at a width in pixels, and waits until its charts are drawn."""
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    media = {"media": "", "features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    browser.get(page.as_uri())
    limit = time.monotonic() + 60
    while ask(browser, "document.documentElement.dataset.charts") is None and time.monotonic() < limit:
        time.sleep(0.05)
    assert ask(browser, "document.documentElement.dataset.charts") == "drawn"


def ask(browser: Any, expression: str) -> Any:
    return browser.execute_script(f"return {expression}")


def cards(browser: Any) -> list[int]:
    return ask(browser, "[...document.querySelectorAll('.pair')].map((card) => Number(card.dataset.n))")


def check_charts(browser: Any, fewest: int) -> None:
    """Every place for a chart holds lines or bars of some extent."""
    drawn = ask(
        browser,
        """[...document.querySelectorAll('.chart')].map((place) => {
             const marks = [...place.querySelectorAll('path.js-line, .bars .point path, .scatterlayer .point')];
             const width = Math.max(0, ...marks.map((mark) => mark.getBBox().width));
             return [place.id, place.dataset.drawn, marks.length, width];
           })""",
    )
    assert len(drawn) >= fewest
    for name, state, marks, width in drawn:
        assert state == "true" and marks > 0 and width > 0, name


def test_a_page_of_fifty_thousand_pairs(browser: Any, large: Path) -> None:
    """Small, quiet, drawn, and nothing in a text is taken for HTML."""
    page = large / "spin" / "report.html"
    assert page.stat().st_size < 5_000_000
    show(browser, page)
    check_charts(browser, fewest=16)
    assert browser.get_log("browser") == []
    assert (
        ask(browser, "performance.getEntriesByType('resource').filter((entry) => !/^(data|blob):/.test(entry.name))")
        == []
    )
    assert ask(browser, "window.hacked") is None
    assert ask(browser, "document.querySelectorAll('#list img, #list script, #list b, h1 i').length") == 0
    assert ask(browser, "document.title").endswith("/<i>run & co")
    text = ask(browser, "document.querySelector('#pairs').innerText")
    shown = len(ask(browser, "JSON.parse(document.querySelector('#data').textContent).pairs.prompts"))
    assert 240 <= shown < 400 and f"{shown} of 50,000 prompts are in this page" in text
    first = ask(browser, "document.querySelector('.pair[data-n=\"0\"] .answer:nth-child(2) .text').textContent")
    assert first == ODD[0]


def test_searching(browser: Any, large: Path) -> None:
    show(browser, large / "spin" / "report.html")
    assert len(cards(browser)) == 20
    field = browser.find_element("id", "search")
    field.send_keys("NEEDLE")
    assert cards(browser) == [2]  # among the extremes, so that the sample has it
    assert "Showing 1 of 1 prompts that match" in ask(browser, "document.querySelector('#shown').textContent")
    assert ask(browser, "document.querySelector('.pair mark').textContent") == "Needle"
    assert "(150,007 characters)" in ask(browser, "document.querySelector('.pair').textContent")
    field.clear()
    field.send_keys("</script>")
    assert cards(browser) == [0]
    field.clear()
    field.send_keys("no such text")
    assert cards(browser) == []
    assert browser.get_log("browser") == []


def test_sorting(browser: Any, large: Path) -> None:
    """By the margin of the chosen iteration: the first are the extremes of all fifty thousand, not of the sample."""
    show(browser, large / "spin" / "report.html")
    answers = read_answers(read_run(large))
    for column, found in enumerate(answers):
        browser.find_element("css selector", f"#column option[value='{column}']").click()
        button = browser.find_element("css selector", "#sort [data-sort='margin']")
        button.click()
        assert "↓" in button.text  # the largest first
        order = np.sort(found.margin)
        assert found.margin[cards(browser)[:6]] == pytest.approx(order[-6:][::-1], abs=1e-4)
        button.click()
        assert "↑" in button.text
        assert found.margin[cards(browser)[:6]] == pytest.approx(order[:6], abs=1e-4)
        browser.find_element("css selector", "#sort [data-sort='n']").click()
    browser.find_element("css selector", "#sort [data-sort='tokens']").click()
    longest = cards(browser)[0]
    assert answers[1].rejected_length[longest] == answers[1].rejected_length.max()
    browser.find_element("id", "cut").click()
    assert all(answers[1].cut[cards(browser)])
    browser.find_element("id", "cut").click()
    browser.find_element("id", "more").click()
    assert len(cards(browser)) == 120


def luminance(browser: Any, selector: str, name: str) -> float:
    colour = ask(browser, f"getComputedStyle(document.querySelector('{selector}')).getPropertyValue('{name}')")
    return float(np.mean([float(part) for part in colour[colour.index("(") + 1 : -1].split(",")[:3]]))


@pytest.mark.parametrize("width", [1300, 380])
def test_light_and_dark_wide_and_narrow(browser: Any, large: Path, width: int) -> None:
    """The page and its charts follow the system, nothing sticks out, and the button overrides the system."""
    page = large / "spin" / "report.html"
    for scheme, dark in (("light", False), ("dark", True)):
        show(browser, page, width, scheme)
        assert (luminance(browser, "body", "background-color") < 60) == dark
        assert (luminance(browser, "#curve-loss .xtick text", "fill") > 128) == dark
        assert ask(browser, "document.documentElement.scrollWidth") <= width
        wide = "[...document.querySelectorAll('.card')].map((card) => card.getBoundingClientRect().right)"
        assert max(ask(browser, wide)) <= width
    button = browser.find_element("id", "theme")
    while "light" not in button.text:
        button.click()
    assert luminance(browser, "body", "background-color") > 200
    assert luminance(browser, "#curve-loss .xtick text", "fill") < 128
    browser.execute_script("localStorage.clear()")
    assert browser.get_log("browser") == []


def test_printing(browser: Any, large: Path) -> None:
    """On paper too, charts are inside the page: printed in dark mode it is white and has text on several pages."""
    show(browser, large / "spin" / "report.html", scheme="dark")
    printed = browser.execute_cdp_cmd("Page.printToPDF", {"printBackground": True})
    pdf = base64.b64decode(printed["data"])
    assert pdf.startswith(b"%PDF") and pdf.count(b"/Type /Page\n") + pdf.count(b"/Type /Page ") >= 3
    assert browser.get_log("browser") == []


def test_a_comparison(browser: Any, tmp_path: Path, large: Path) -> None:
    """Two runs over the same prompts, of which one has just begun: curves of both, and answers next to each other."""
    for name, words, begun in (("one", 6, 3), ("two", 9, 1)):
        finished.make(tmp_path / name, iterations=3, words=words, begun=begun)
    page = tmp_path / "both.html"
    done = CliRunner().invoke(spin, ["report", str(tmp_path / "one"), str(tmp_path / "two"), "--output", str(page)])
    assert done.exit_code == 0, done.output
    show(browser, page)
    check_charts(browser, fewest=12)
    assert ask(browser, "document.querySelectorAll('#curve-loss path.js-line').length") >= 2
    legend = ask(browser, "[...document.querySelectorAll('.legend')].map((box) => box.innerText)")
    assert any("one" in text and "two" in text for text in legend)
    heads = ask(browser, "[...document.querySelectorAll('.pair:first-child h4')].map((head) => head.textContent)")
    assert [head.split(" · ")[0] for head in heads] == [
        "human", "one, iteration 0", "one, iteration 1", "one, iteration 2", "two, iteration 0",
    ]  # fmt: skip
    assert browser.get_log("browser") == []


def test_the_best_iteration_and_what_changed(browser: Any, tmp_path: Path) -> None:
    """Four iterations: the start model's point, error bars of two standard errors, a star, and answers side by side."""
    finished.make(tmp_path / "four", iterations=4)
    done = CliRunner().invoke(spin, ["report", str(tmp_path / "four")])
    assert done.exit_code == 0, done.output
    show(browser, tmp_path / "four" / "spin" / "report.html")
    check_charts(browser, fewest=17)
    [first, *_, final] = ask(browser, "[...document.querySelectorAll('.facts .best')].map((line) => line.innerText)")
    assert first == "best by eval_loss (lower is better): iteration 0, 2.0000 ± 0.0200"
    assert final == "the final model is that of iteration 0"
    rows = ask(
        browser, "[...document.querySelectorAll('#iterations tbody td:first-child')].map((cell) => cell.innerText)"
    )
    assert rows == ["start", "0 ★", "1", "2", "3"]
    ticks = "[...document.querySelectorAll('#iteration-nll .xtick text')].map((tick) => tick.textContent)"
    assert ask(browser, ticks) == ["start", "0", "1", "2", "3"]
    drawn = ask(browser, "document.getElementById('iteration-nll').data[0]")
    assert drawn["y"] == pytest.approx([2.2, 2.0, 1.9, 1.8, 1.7])
    assert drawn["error_y"]["array"] == pytest.approx([0.06, 0.04, 0.04, 0.04, 0.04])
    assert ask(browser, "document.querySelectorAll('#iteration-nll .yerror').length") == 5
    heads = ask(browser, "[...document.querySelectorAll('.change:first-of-type h4')].map((head) => head.innerText)")
    assert heads == ["human · 2 tokens", "iteration 2 · 4 tokens", "iteration 3 · 5 tokens"]
    said = ask(browser, "[...document.querySelectorAll('.change header')].map((head) => head.innerText)")
    assert (
        said[0] == "human answer likelier by 0.750 nats per token" and len(said) == 8
    )  # prompt 5: 6/4 nats, two tokens
    assert said[-1] == "human answer less likely by 1.500 nats per token"
    assert ask(browser, "document.querySelector('.change .prompt').textContent") == "<b>held-out 5"
    assert browser.get_log("browser") == []


# ends what it stands in, whichever that is, and then runs; each part would say so by a number of its own
ATTACK = (
    "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 2'>\"><svg/onload=window.hacked=3> "
    '\'><a href="javascript:window.hacked = 4">click</a> --></title></style><script>window.hacked = 5</script> {{ 7 * 7 }} '
    "{% raw %} javascript:window.hacked=6 `<iframe srcdoc='<script>parent.hacked = 7</script>'>` <b>bold</b> \x1b[2J"
)


def attacked(value: Any) -> Any:
    """Returns JSON with the attack in place of every text, and as a key beside the others."""
    if isinstance(value, dict):
        return {**{key: attacked(item) for key, item in value.items()}, ATTACK: ATTACK}
    if isinstance(value, list):
        return [attacked(item) for item in value]
    return ATTACK if isinstance(value, str) else value


def attack(out: Path, number: int) -> None:
    """Makes a run, with the attack wherever one of its files has a text."""
    finished.make(out, odd=[ATTACK, ATTACK[:200]], base_model=ATTACK, **{"spin.loss": ATTACK, "lora_model_dir": ATTACK})
    directory = RunDirectory(out)
    hardware = {
        "host": "h",
        "cpu": "c",
        "cores": 2,
        "memory_gib": 1.0,
        "system": "s",
        "gpus": [{"name": "g", "memory_gib": 1.0}],
    }
    start = {"time": "t", "step": number, "config_file": "f", "changed": {"k": [1, 2]}, "ranks": 2, "sharding": "z",
             "versions": {"torch": "v", "python": "v"}, "hardware": hardware}  # fmt: skip
    about = {"config": {"base_model": "b", "seed": number, "list": ["a"]}, "starts": [start, start],
             "ended": {"step": 3, "why": "w"}}  # fmt: skip
    directory.about.write_text(json.dumps(attacked(about)))
    directory.best.write_text(json.dumps({**json.loads(directory.best.read_text()), "says": [ATTACK] * 2}))
    for iteration in range(2):
        path = directory.metrics(iteration)
        figures = {**json.loads(path.read_text()), f"spin/eval/{ATTACK}/acc": 0.5, f"spin/eval/task/{ATTACK}": 0.4,
                   ATTACK: ATTACK, "spin/heldout_distinct_2": ATTACK}  # fmt: skip
        path.write_text(json.dumps(figures))
    for play in (directory.heldout(None), directory.heldout(1)):
        table = pq.read_table(play)
        rows = [{**row, "prompt": ATTACK, "human": ATTACK, "own": ATTACK} for row in table.to_pylist()]
        pq.write_table(pa.Table.from_pylist(rows), play)


@pytest.mark.parametrize("compared", [False, True])
def test_no_text_of_a_run_is_a_script(browser: Any, tmp_path: Path, compared: bool) -> None:
    """Wherever a text stands in a run's files, in the names of its folders, and in charts, where Plotly takes some HTML."""
    names = ["<img src=x onerror='window.hacked = 8'>", "<a href='javascript:window.hacked = 9'>b"][: 1 + compared]
    runs = [tmp_path / name for name in names]
    for number, run in enumerate(runs):
        attack(run, number)
    page = tmp_path / "page.html"
    done = CliRunner().invoke(spin, ["report", *map(str, runs), "--output", str(page)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    show(browser, page)
    browser.execute_script("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    browser.find_element("id", "search").send_keys("onerror")
    assert len(cards(browser)) == 2 and ATTACK in ask(browser, "document.querySelector('#list').textContent")
    browser.execute_script("document.querySelectorAll('.legend button').forEach((one) => one.click())")
    assert "window.hacked" in ask(browser, "document.querySelector('#charts').textContent")  # as a text, in a chart
    assert ask(browser, "window.hacked") is None
    scripts = "[...document.scripts].map((one) => one.id || one.textContent.length > 1000)"
    assert sorted(map(str, ask(browser, scripts))) == ["True", "True", "data", "plotly"]
    assert ask(browser, "document.querySelectorAll('img, iframe, b:not(.version b), a:not(nav a)').length") == 0
    named = "[...document.querySelectorAll('*')].flatMap((one) => one.getAttributeNames())"
    assert not [name for name in ask(browser, named) if name.startswith("on")]
    assert browser.get_log("browser") == []


def test_the_page_runs_no_other_script_and_asks_nobody(browser: Any, tmp_path: Path) -> None:
    """Even a text that did end up as HTML could neither run nor tell anybody: the browser holds the page to its policy."""
    finished.make(tmp_path)
    page = tmp_path / "page.html"
    done = CliRunner().invoke(spin, ["report", str(tmp_path), "--output", str(page)])
    assert done.exit_code == 0, done.output
    show(browser, page)
    tried = browser.execute_async_script(
        """const done = arguments[0];
           const inline = document.createElement('script');
           inline.textContent = 'window.hacked = 1';
           document.head.append(inline);
           document.body.insertAdjacentHTML('beforeend', `<img src="data:image/png;base64,AA" onerror="window.hacked = 2">
             <iframe srcdoc="<script>parent.hacked = 3</script>"></iframe>
             <a id="bad" href="javascript:window.hacked = 4">x</a>`);
           document.getElementById('bad').click();
           fetch('data:text/plain,sent').then(() => 'sent', () => 'refused').then((sent) =>
             setTimeout(() => done([sent, window.hacked === undefined]), 300));"""
    )
    assert tried == ["refused", True]
    refused = [entry["message"] for entry in browser.get_log("browser")]
    assert sum("Content Security Policy" in message for message in refused) >= 4, refused
