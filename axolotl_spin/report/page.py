"""Puts a report together: one HTML file with its style, its script, Plotly and all data inside."""

from __future__ import annotations

import base64
import datetime
import gzip
import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jinja2
import yaml
from markupsafe import Markup, escape
from plotly.offline import get_plotlyjs

from axolotl_spin.monitor.benchmarks import eval_columns
from axolotl_spin.monitor.metrics import METRICS, start_figures
from axolotl_spin.report.answers import Sample, read_answers, sample
from axolotl_spin.report.benchmarks import benchmarks
from axolotl_spin.report.changes import Changes, read_changes
from axolotl_spin.report.charts import Chart, curves
from axolotl_spin.report.figures import collect
from axolotl_spin.report.guide import Advice, judge
from axolotl_spin.report.pictures import EACH, add_pictures
from axolotl_spin.report.reading import RunData, number
from axolotl_spin.report.summaries import iterations

_HERE = Path(__file__).parent


@dataclass
class RunView:
    """What the page says of one run.

    Attributes:
        run: As read.
        advice: What applies to it.
        opponents: For each iteration: which model answered, and its identity.
        changes: What changed on held-out prompts; None where that is not known.
        config: What the user wrote, as YAML.
    """

    run: RunData
    advice: list[Advice]
    opponents: list[dict[str, Any]]
    changes: Changes | None
    config: str

    @property
    def start(self) -> dict[str, Any]:
        """The last start."""
        starts = self.run.about.get("starts") or [{}]
        return starts[-1]

    @property
    def best(self) -> list[str]:
        """Which iteration is the best, and what is noise, in sentences."""
        return [str(line) for line in self.run.best.get("says") or []]

    @property
    def final(self) -> str:
        """Whose model is in `output_dir`, where that is known."""
        kept = self.run.best.get("kept")
        return "" if kept is None else f"the final model is that of iteration {kept}"

    @property
    def releases(self) -> str:
        """The versions that matter most."""
        versions = self.start.get("versions") or {}
        names = ("axolotl-spin", "axolotl", "transformers", "torch")
        return ", ".join(f"{name} {versions[name]}" for name in names if name in versions)

    @property
    def state(self) -> str:
        """Where the run stands, in words."""
        return self.run.standing


def render(runs: Sequence[RunData]) -> bytes:
    """Returns the page of a run, or of several for comparison, in UTF-8.

    Args:
        runs: As `read_run` gives them; names are made distinct.
    """
    _tell_apart(runs)
    answers = [read_answers(run) for run in runs]
    views = [_view(run, found) for run, found in zip(runs, answers, strict=True)]
    drawn = {"over steps": curves(runs), "by iteration": [*iterations(runs, answers), *benchmarks(runs)]}
    pairs = sample(answers)
    add_pictures(pairs, runs)
    columns, rows = _table(runs)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    environment.filters.update(keys=_with_keys, moment=_moment)
    script, plotly = _raw("page.js"), get_plotlyjs()
    text = environment.get_template("page.html").render(
        views=views,
        title=f"SPIN: {', '.join(run.name for run in runs)}",
        made=_moment(datetime.datetime.now(datetime.UTC).isoformat()),
        groups=drawn,
        columns=columns,
        rows=rows,
        sample=pairs,
        pictures_each=EACH,
        differences=_differences(runs),
        style=_raw("page.css"),
        script=script,
        plotly=_raw_text(base64.b64encode(gzip.compress(plotly.encode(), 9, mtime=0)).decode()),
        policy=_policy(script, plotly),
        data=_data(drawn, pairs),
    )
    return text.encode("utf-8", "replace")  # names of files may hold what is no text


def _policy(*scripts: str) -> str:
    """Returns a Content-Security-Policy by which these scripts run and no other, and nothing is loaded or sent.

    A browser holds to it even where a text of a run were to end up as HTML. Plotly writes styles of its own.

    Args:
        scripts: As they stand in the page, or are put there.
    """
    digests = (base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts)
    allowed = " ".join(f"'sha256-{digest}'" for digest in digests)
    rest = "style-src 'unsafe-inline'; img-src data: blob:; base-uri 'none'; form-action 'none'"
    return f"default-src 'none'; script-src {allowed}; {rest}"


def _with_keys(text: str) -> Markup:
    """Returns a text of ours as HTML, with what stands in backticks as code."""
    parts = [escape(part) for part in text.split("`")]
    return Markup("").join(Markup("<code>{}</code>").format(part) if i % 2 else part for i, part in enumerate(parts))


def _moment(time: str) -> str:
    """Returns an ISO time for the eye, to the minute."""
    return f"{time[:16].replace('T', ' ')} UTC" if time.endswith("+00:00") else time


def _tell_apart(runs: Sequence[RunData]) -> None:
    """Names each run by as many of its path's last parts as tell them apart; one run by two."""
    paths = [run.directory.root.parent.resolve().parts for run in runs]
    count = 2 if len(runs) == 1 else 1
    while len({parts[-count:] for parts in paths}) < len(set(paths)):
        count += 1
    for run, parts in zip(runs, paths, strict=True):
        run.name = "/".join(parts[-count:])


def _view(run: RunData, answers: Sequence[Any]) -> RunView:
    marked = {found.iteration for found in answers}
    opponents = []
    for entry in run.iterations:
        identity = run.mark(entry.iteration) if run.fixed else ""
        opponents.append(
            {**entry.to_json(), "opponent": run.opponent(entry.iteration), "identity": identity,
             "answered": entry.iteration in marked}
        )  # fmt: skip
    config = run.about.get("config")
    text = yaml.safe_dump(config, sort_keys=False, allow_unicode=True, width=100) if config else ""
    return RunView(run, judge(collect(run, answers)), opponents, read_changes(run), text)


def _table(runs: Sequence[RunData]) -> tuple[list[dict[str, str]], list[list[str]]]:
    """Returns the table's columns and rows of text; columns without any figure are left out."""
    figures: list[tuple[RunData, str, dict[str, Any]]] = []
    for run in runs:
        start = start_figures(run.metrics.get(0, {}))
        figures += [(run, "start", start)] if start else []
        leader = run.best.get("best")
        figures += [(run, f"{i} ★" if i == leader else str(i), found) for i, found in sorted(run.metrics.items())]
    asked = eval_columns(found for _, _, found in figures)
    columns = [metric for metric in METRICS if metric.heading]
    shown = [metric for metric in columns if any(number(found, metric.name) is not None for _, _, found in figures)]
    rows = []
    for run, label, found in figures:
        cells = [run.name, label] if len(runs) > 1 else [label]
        for metric in shown:
            value, form = number(found, metric.name), metric.page_form or metric.form
            cells.append("-" if value is None else _time(value) if form == "time" else form.format(value))
        rows.append(cells + [column.cell(found) for column in asked])
    headings = [{"heading": metric.title, "about": metric.about} for metric in shown]
    about = "a benchmark's figure with its standard error"
    return headings + [{"heading": f"{column.task} {column.metric}", "about": about} for column in asked], rows


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 120:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def _differences(runs: Sequence[RunData]) -> list[list[str]]:
    """Returns the config's keys in which runs differ, with each run's value; `output_dir` always does."""
    configs = [_flat(run.about.get("config") or {}) for run in runs]
    keys = sorted({key for config in configs for key in config})
    skipped = {"output_dir", "dataset_prepared_path"}
    return [
        [key, *(config.get(key, "-") for config in configs)]
        for key in keys
        if len({config.get(key) for config in configs}) > 1 and key not in skipped
    ]


def _flat(value: Any, prefix: str = "") -> dict[str, str]:
    if isinstance(value, dict) and value:
        return {key: text for name, item in value.items() for key, text in _flat(item, f"{prefix}{name}.").items()}
    return {prefix.removesuffix("."): value if isinstance(value, str) else json.dumps(value)}


def _data(drawn: dict[str, list[Chart]], pairs: Sample) -> Markup:
    charts = [chart.to_json() for group in drawn.values() for chart in group]
    return _embedded({"charts": charts, "pairs": asdict(pairs)})


def _embedded(value: Any) -> Markup:
    """Returns JSON that may stand inside a `script` element: nothing in it ends the element or is read as HTML."""
    text = json.dumps(_finite(value), ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    # a lone surrogate is no UTF-8; as `\udXXX` it is what JSON writes
    return _raw_text(text.encode("utf-8", "backslashreplace").decode("utf-8"))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _raw(name: str) -> Markup:
    return _raw_text((_HERE / name).read_text(encoding="utf-8"))


def _raw_text(text: str) -> Markup:
    return Markup(text)
