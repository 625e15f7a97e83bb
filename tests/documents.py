"""The pages of the documentation: their blocks, and the tables in them that are generated.

    python tests/documents.py

writes those tables anew. A generated table stands between `<!-- name -->` and `<!-- /name -->`.
"""

from __future__ import annotations

import ast
import json
import re
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

import yaml
from test_house import ORDER, PACKAGE

ROOT = PACKAGE.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "AGENTS.md", *sorted((ROOT / "docs").glob("*.md"))]

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        page: Where it stands.
        language: Behind its fence.
        text: Between the fences.
    """

    page: Path
    language: str
    text: str


def blocks(page: Path, language: str | None = None) -> list[Block]:
    """Returns a page's fenced blocks, of one language or of all."""
    found = [Block(page, kind, text) for kind, text in _FENCE.findall(page.read_text())]
    return [block for block in found if language in (None, block.language)]


def prose(page: Path) -> str:
    """Returns a page without its fenced blocks."""
    return _FENCE.sub("", page.read_text())


def codes(page: Path) -> list[str]:
    """Returns what a page's prose and tables set as code."""
    return [code.replace("\n", " ") for code in re.findall(r"`([^`]+)`", prose(page))]


def commands(block: Block) -> Iterator[str]:
    """Yields the commands of a bash block, `&&` taken apart and comments left out."""
    for line in block.text.replace("\\\n", " ").splitlines():
        for part in re.sub(r"(^|\s)#.*", "", line).split(" && "):
            if part.strip():
                yield part.strip()


def heads(page: Path) -> set[str]:
    """Returns the anchors of a page's headings, as GitHub makes them."""
    found = re.findall(r"^#+ (.+)$", prose(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in found}


# -- generated tables --------------------------------------------------------------------------------------------------


def spin_keys() -> dict[str, tuple[str, str]]:
    """Returns default and description of each key of the `spin:` block that a user may set, from the schema."""
    from axolotl_spin.settings.generation import GenerationConfig, VllmConfig
    from axolotl_spin.settings.spin import SpinConfig

    found = {}
    for prefix, model in (("", SpinConfig), ("generation.", GenerationConfig), ("generation.vllm.", VllmConfig)):
        for name, field in model.model_fields.items():
            if name not in ("active", "generation", "vllm"):
                default = yaml.safe_dump(field.default).splitlines()[0]
                found[prefix + name] = (f"`{default}`", field.description or "")
    return found


def _row(*cells: str) -> str:
    return "|" + "".join(f" {cell} |" if cell else " |" for cell in cells)


def _keys() -> list[str]:
    rows = [_row(f"`{name}`", default, about) for name, (default, about) in spin_keys().items()]
    rows.append(_row("`generation.vllm.*`", "", "Any other engine argument of vLLM, by its own name."))
    return ["| key | default | |", "|---|---|---|", *rows]


def _metrics() -> list[str]:
    from axolotl_spin.monitor.metrics import METRICS

    rows = [
        _row(f"`{metric.name}`", metric.about, metric.title, metric.line[0] if metric.line else "")
        for metric in METRICS
    ]
    return ["| metric | | column | line |", "|---|---|---|---|", *rows]


def markers() -> dict[str, str]:
    """Returns the markers of tests and what they say."""
    options = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]
    return dict(marker.split(": ", 1) for marker in options["markers"])


def _markers() -> list[str]:
    return ["| marker | |", "|---|---|", *(_row(f"`{name}`", about) for name, about in markers().items())]


def _about(path: Path) -> str:
    """Returns the first sentence of a module's docstring."""
    about = (ast.get_docstring(ast.parse(path.read_text())) or "").split("\n\n")[0].replace("\n", " ")
    return about.split(". ")[0].rstrip(".")


def _rooms() -> list[str]:
    rows = []
    for name in ORDER:
        folder = PACKAGE / name
        if folder.is_dir():
            files = sorted(path for path in folder.iterdir() if path.suffix == ".py" and path.stem != "__init__")
            parts = sorted(path for path in folder.iterdir() if (path / "__init__.py").exists())
            inside = [f"`{path.stem}`" for path in files]
            for part in parts:
                stems = sorted(path.stem for path in part.glob("*.py") if path.stem != "__init__")
                inside.append(f"`{part.name}/` ({', '.join(stems)})")
            rows.append(_row(f"`{name}/`", _about(folder / "__init__.py"), ", ".join(inside)))
        else:
            rows.append(_row(f"`{name}.py`", _about(folder.with_suffix(".py")), ""))
    return ["| room | what is in it | files |", "|---|---|---|", *rows]


def _architectures() -> list[str]:
    """Returns what `make test-configs` measured."""
    figures = json.loads((ROOT / "tests" / "configs" / "figures.json").read_text())["figures"]
    rows = []
    for name, found in figures.items():
        if isinstance(found, str):
            rows.append(_row(name, "not run", found, "", "", "", ""))
            continue
        losses = ", ".join(f"{loss:.5f}" for loss in found["first_losses"])
        where, answers = "head" if found["in_head"] else "output", f"{found['same']} of {found['asked']}"
        why = found["why"].replace("`", "")  # no keys that a reader would set
        rows.append(_row(name, found["layout"], why, where, losses, f"{found['off']:.0e}", answers))
    return [
        "| architecture | layout | because | log-probs at | first losses | off by | answers |",
        "|---" * 7 + "|",
        *rows,
    ]


def _study() -> list[str]:
    """Returns what `make study` measured: means over seeds, with the standard deviation between them."""
    rows = json.loads((ROOT / "tests" / "benchmarks" / "study.json").read_text())["rows"]
    models = dict.fromkeys((row["arm"], row["iteration"]) for row in rows)
    figures = {"nll": "4f", "auc": "3f", "length": "1f", "distinct_2": "3f", "f1": "3f"}
    table = ["| | iteration | held-out NLL | AUC | tokens an answer | distinct-2 | token F1 |", "|---" * 7 + "|"]
    for arm, iteration in models:
        seeds = [row for row in rows if (row["arm"], row["iteration"]) == (arm, iteration)]
        cells = []
        for name, form in figures.items():
            values = [row[name] for row in seeds if name in row]
            if not values:
                cells.append("")
                continue
            spread = f" ± {stdev(values):.{form}}" if len(values) > 1 else ""
            cells.append(f"{mean(values):.{form}}{spread}")
        objective = f"`{arm}`" if arm in ("sigmoid", "space") else arm
        table.append(_row(objective, "" if iteration is None else str(iteration), *cells))
    return table


def _scale() -> list[str]:
    """Returns what `tests/benchmarks/simulation.py` found."""
    rows = []
    for entry in json.loads((ROOT / "tests" / "benchmarks" / "simulation.json").read_text())["figures"]:
        case, seconds = entry["case"], entry["seconds"]
        trained = "LoRA" if case["adapter"] else "all weights"
        rows.append(
            _row(
                case["model"],
                trained,
                str(case["ranks"]),
                str(case["accumulation"]),
                "yes" if case["checkpointing"] else "no",
                f"{entry['step']['peak'] / 2**30:.1f} GiB",
                f"{seconds['compute']:.2f} s",
                f"{seconds['network']:.2f} s",
            )
        )
    heads = ("model", "trained", "GPUs", "micro-batches a step", "checkpointing", "peak", "products", "collectives")
    return [_row(*heads), "|---" * len(heads) + "|", *rows]


GENERATED: dict[str, tuple[str, Callable[[], list[str]]]] = {
    "architectures": ("docs/models.md", _architectures),
    "keys": ("docs/configuration.md", _keys),
    "markers": ("CONTRIBUTING.md", _markers),
    "metrics": ("docs/monitoring.md", _metrics),
    "rooms": ("docs/how-it-works.md", _rooms),
    "scale": ("docs/tuning.md", _scale),
    "study": ("docs/results.md", _study),
}


def with_table(text: str, name: str) -> str:
    """Returns a page's text with a generated table as it has to be."""
    table = "\n".join(GENERATED[name][1]())
    made, count = re.subn(
        rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)",
        lambda match: f"{match[1]}\n{table}\n\n{match[2]}",
        text,
        flags=re.DOTALL,
    )
    assert count == 1, f"the page has no place for the table `{name}`"
    return made


if __name__ == "__main__":
    for name, (page, _) in GENERATED.items():
        path = ROOT / page
        path.write_text(with_table(path.read_text(), name))
