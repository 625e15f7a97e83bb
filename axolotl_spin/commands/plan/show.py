"""What `axolotl spin plan` prints."""

from __future__ import annotations

from typing import Any

from axolotl_spin.commands.plan.memory import gib
from axolotl_spin.monitor.tables import plan_table
from axolotl_spin.run.plan import Plan

_BAR = 40


def plan_lines(plan: Plan, figures: dict[str, Any]) -> list[Any]:
    """Returns what is printed: the table of iterations, and lines.

    Args:
        plan: The run's.
        figures: See `planning.plan_run`.
    """
    parts: list[Any] = [plan_table(plan), *_about_the_table(plan, figures), ""]
    for name, lengths in figures["lengths"].items():
        parts += _histogram(name.replace("_", " "), lengths)
    parts += ["", *_cut(figures["cut"]), *filter(None, [figures["endings"]["text"]]), ""]
    parts += [*_memory(figures["memory"]), "", *_time(figures), "", *_selection(figures["selection"])]
    folder = figures["folder"]
    parts.append(f"output_dir {folder['output_dir']} holds {folder['holds']}" + (":" if "changes" in folder else ""))
    parts += [f"  {line}" for line in folder.get("changes", [])]
    if figures["advice"]:
        parts += ["", "Unusual:", *(f"  {item['key']}: {item['text']}" for item in figures["advice"])]
    return parts


def _about_the_table(plan: Plan, figures: dict[str, Any]) -> list[str]:
    """Says what the table of iterations does not show: a part of the prompts each time, and a longer schedule."""
    lines, last = [], plan.iterations[-1]
    size, prompts = figures["prompts_per_iteration"], figures["prompts"]
    if size is not None:
        lines.append(
            f"each iteration answers {size} of {prompts} prompts, others each time until all have had their turn, after "
            f"{-(-prompts // size)} iterations"
        )
    if last.schedule is not None:
        lines.append(
            f"the learning rate's schedule is laid out over {figures['schedule_epochs']} epochs of an iteration, of which "
            f"{plan.num_epochs} are run: in iteration {last.iteration} over {last.schedule} steps, of which {last.steps} "
            "are taken"
        )
    return lines


def _selection(selection: dict[str, Any]) -> list[str]:
    select, patience = selection["select"], selection["patience"]
    if select is None:
        return ["no iteration is called the best: there is no held-out data, and no spin.select"]
    kept = "its model becomes the final one" if selection["keep"] == "best" else "the last one's model is the final one"
    lines = [f"the best iteration is told by {select}; {kept} (spin.keep: {selection['keep']})"]
    if patience is not None:
        which = "an iteration that is" if patience == 1 else f"{patience} iterations in a row that are"
        lines.append(f"the run may end earlier than planned: after {which} no better (spin.patience: {patience})")
    return lines


def _histogram(name: str, lengths: dict[str, Any]) -> list[str]:
    most = max(entry["count"] for entry in lengths["histogram"])
    lines = [
        f"tokens of a {name}: {lengths['total']} in all, mean {lengths['mean']:.1f}, median {lengths['median']}, "
        f"95% up to {lengths['p95']}, {lengths['min']} to {lengths['max']}"
    ]
    for entry in lengths["histogram"]:
        bar = "#" * max(round(_BAR * entry["count"] / most), int(entry["count"] > 0))
        lines.append(f"  {entry['from']:>6} - {entry['to']:<6} {entry['count']:>8}  {bar}")
    return lines


def _cut(cut: dict[str, Any]) -> list[str]:
    return [
        f"an answer has at most {cut['max_new_tokens']} tokens and ends at sequence_len {cut['sequence_len']}: "
        f"{cut['human_answers_beyond_limit']} human answers are longer, {cut['prompts_with_less_room']} prompts leave "
        "less room",
    ]


def _memory(memory: dict[str, Any]) -> list[str]:
    if "missing" in memory:
        return [f"memory: unknown, {memory['missing']}"]
    names = ("weights", "gradients", "optimizer", "activations")
    parts = ", ".join(f"{name} {gib(memory[name], 2)}" for name in names)
    answering = [f"  answering, beside the weights: {gib(memory['answering'], 2)} at the most"]
    layout = f"{memory['ranks']} rank(s), {memory['sharding'] or 'no sharding'}"
    return [
        f"memory on each rank, estimated ({layout}; {memory['parameters']:,} parameters, {memory['trainable']:,} trained):",
        f"  training {gib(memory['training'], 2)}: {parts}",
        *_pictures(memory),
        *(answering if memory["answering"] is not None else []),
        *(f"  {note}" for note in memory["notes"]),
    ]


def _pictures(memory: dict[str, Any]) -> list[str]:
    if "pictures" not in memory:
        return []
    return [
        f"  of these, pictures {gib(memory['pictures'], 2)}; {memory['towers']:,} parameters are beside the language model"
    ]


def _time(figures: dict[str, Any]) -> list[str]:
    time = figures["time"]
    lines = [f"time: {_span(time['total_seconds'])}"]
    for phase, rate in time["rates"].items():
        speed = "unknown" if rate["tokens_per_second"] is None else f"{rate['tokens_per_second']:.0f} tokens/s"
        lines.append(f"  {phase}: {speed} ({rate['source']})")
    for row, tokens in zip(time["iterations"], figures["tokens"], strict=True):
        spans = ", ".join(f"{phase} {_span(row[f'{phase}_seconds'])}" for phase in time["rates"])
        lines.append(f"  iteration {row['iteration']}: {_range(tokens['pairs'])} tokens of pairs; {spans}")
    if time["total_seconds"] is None:
        lines.append("  give --generation-tokens-per-second, --scoring-tokens-per-second, --training-tokens-per-second")
    return lines


def _span(seconds: list[float] | None) -> str:
    if seconds is None:
        return "unknown"
    low, high = (_clock(value) for value in seconds)
    return low if low == high else f"{low} to {high}"


def _clock(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _range(bounds: Any) -> str:
    low, high = bounds
    return f"{low:,.0f}" if low == high else f"{low:,.0f} to {high:,.0f}"
