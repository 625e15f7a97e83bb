"""Which layout a model takes, and where its log-probs can be taken: asked before anything depends on it.

Four questions, each with an answer of its own. Does every layer attend to all that a pair has? Its config says so
(`preferred_layout`). Does the model do nothing to the logits that its LM head gives? Then both ways to take log-probs give
the same numbers, whatever the precision (`head_off`). Does its attention keep to the layout? Then log-probs move by no
more than padded rows' do when other rows stand beside them, which is rounding (`layout_off`). Does it do so without a mask
of tokens x tokens, which long rows do not get? Then log-probs move by no more than that either (`parts_off`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from accelerate.utils.other import is_compiled_module
from axolotl.utils.logging import get_logger
from torch import Tensor

from axolotl_spin.compat import text_config
from axolotl_spin.data.images import ImageRows
from axolotl_spin.ranks.bare import bare
from axolotl_spin.training.head import TiledHead
from axolotl_spin.training.layouts import Layout, PairCollator
from axolotl_spin.training.logprobs import completion_logps
from axolotl_spin.training.policy import frozen
from axolotl_spin.training.preferred_layout import preferred_layout
from axolotl_spin.training.tried_pairs import LONG, Pair, tried_pairs

LOG = get_logger(__name__)

_TOGETHER = 2  # pairs that are tried out at a time

# times what padded rows differ by: 352 sound cases (six architectures, two layouts, bf16 and fp32, answers of one token and
# of eighty) came to 0.84 at most, SmolLM2-135M in bf16 to 0.66; masks or positions that are not heeded to 7 and more
_NOISE = 3.0
# in nats per root of a token, where there is next to no noise: those cases stayed below 1e-5 in fp32
_LEAST = 1e-3
# nats per token between two ways to take the same logits: nothing but the last digits of sums over the vocabulary
_EXACT = 1e-5


def head_off(model: Any, pairs: Sequence[Pair], collator: PairCollator, device: Any) -> float:
    """Returns how far log-probs taken in the LM head are from those of the same forward's output, in nats per token.

    Both ways compute the same products of the same shapes, so that any difference is something that the model does to its
    logits, and no rounding; but for models that do not give themselves the same numbers twice, whose own difference is
    taken off.

    Args:
        model: The policy as the trainer wraps it, in `eval()`; every rank must call.
        pairs: Some of the longest.
        collator: Of the layout.
        device: Where the model is.
    """
    off = []
    for pair in pairs:
        # both answers of one length, so that padded rows are asked for the very positions that the head is given
        alike = {**pair, "rejected_ids": pair["chosen_ids"][::-1]}
        output = _logps(model, [alike], collator, device, in_head=False)
        again = _logps(model, [alike], collator, device, in_head=False)
        apart = (_logps(model, [alike], collator, device, in_head=True) - output).abs() - (again - output).abs()
        off.append(apart.max() / len(pair["chosen_ids"]))
    return float(torch.stack(off).max())  # NaN, where one is


def layout_off(model: Any, pairs: Sequence[Pair], collator: PairCollator, device: Any) -> tuple[float, float]:
    """Returns how far a layout's log-probs are from padded rows', and how far those are from each other.

    The first also counts how much an answer's log-probs move when the other answer of its pair, and the pairs beside it,
    are exchanged for other tokens: by nothing, where the attention keeps to the layout.

    Args:
        model: The policy as the trainer wraps it, in `eval()`; every rank must call.
        pairs: More than one.
        collator: Of the layout, with `in_head` as it will be.
        device: Where the model is.

    Returns:
        Both in nats per root of a token, as rounding grows: the root of the mean square over all answers. The second is
        between padded rows of one pair and of several.
    """
    padded = PairCollator(collator.pad_token_id, "padded")

    def logps(rows: Sequence[Pair], collate: PairCollator) -> Tensor:
        """Returns (2, pairs): of the human answers and of the others."""
        return _logps(model, rows, collate, device, in_head=collator.in_head).view(2, -1)

    apart, moved, noise = [], [], []
    for start in range(0, len(pairs), _TOGETHER):
        rows = pairs[start : start + _TOGETHER]
        root = torch.tensor([[len(row[kind]) for row in rows] for kind in ("chosen_ids", "rejected_ids")]).sqrt()
        found, together = logps(rows, collator), logps(rows, padded)
        with rounded_otherwise(model):
            alone = torch.cat([logps([row], padded) for row in rows], dim=1)
        # a prompt with pictures stays as they have it
        whole = ("chosen_ids", "rejected_ids") if "images" in rows[0] else ("prompt_ids", "chosen_ids", "rejected_ids")
        others = [_other_tokens(row, whole if place % 2 else ("chosen_ids",)) for place, row in enumerate(rows)]
        apart.append(((found - together) / root).flatten())
        noise.append(((alone - together) / root).flatten())
        moved.append(((found - logps(others, collator)) / root)[1, ::2])
    off = torch.stack([_root_mean_square(apart), _root_mean_square(moved)]).max()  # NaN, where one is
    return float(off), float(_root_mean_square(noise))


def parts_off(model: Any, pairs: Sequence[Pair], collator: PairCollator, device: Any) -> tuple[float, float]:
    """Returns how far the shared layout's log-probs are without a mask of tokens x tokens, in nats per root of a token.

    Args:
        model: The policy as the trainer wraps it, in `eval()`; every rank must call.
        pairs: Some of the longest.
        collator: Of the shared layout, with `in_head` as it will be; its `in_parts` is changed.
        device: Where the model is.

    Returns:
        That, and how far rounding moves them, both as a root of the mean square.
    """
    root = torch.tensor([len(row[kind]) for kind in ("chosen_ids", "rejected_ids") for row in pairs]).sqrt()
    found = {}
    for way in (False, "always"):
        collator.in_parts = way
        found[way] = _logps(model, pairs, collator, device, in_head=collator.in_head)
    with rounded_otherwise(model):
        rounded = _logps(model, pairs, collator, device, in_head=collator.in_head)
    off, noise = (found["always"] - found[False]) / root, (rounded - found["always"]) / root
    return float(_root_mean_square([off])), float(_root_mean_square([noise]))


def padding_off(model: Any, pairs: Sequence[Pair], collator: PairCollator, device: Any) -> tuple[float, float]:
    """Returns how far padding moves log-probs, and how far rounding does, in nats per root of a token.

    Args:
        model: The policy as the trainer wraps it, in `eval()`; every rank must call.
        pairs: Some.
        collator: Of the padded layout, with `in_head` as it will be.
        device: Where the model is.
    """
    apart, noise = [], []
    for pair in pairs:
        alike = {**pair, "rejected_ids": pair["chosen_ids"][::-1]}  # two sequences of one length: nothing is padded
        longer = {**alike, "prompt_ids": [*alike["prompt_ids"], *alike["prompt_ids"], *alike["chosen_ids"]]}
        if "images" in pair:  # whose prompt is as long as its pictures have it
            longer = {**alike, "chosen_ids": [*alike["chosen_ids"]] * 3, "rejected_ids": [*alike["chosen_ids"]] * 3}
        alone, beside = (
            _logps(model, rows, collator, device, in_head=collator.in_head) for rows in ([alike], [alike, longer])
        )
        with rounded_otherwise(model):
            rounded = _logps(model, [alike], collator, device, in_head=collator.in_head)
        root = len(pair["chosen_ids"]) ** 0.5
        apart.append((beside[::2] - alone) / root)
        noise.append((rounded - alone) / root)
    return float(_root_mean_square(apart)), float(_root_mean_square(noise))


@contextmanager
def rounded_otherwise(model: torch.nn.Module) -> Iterator[None]:
    """Moves what each linear layer gives by up to half a unit in the last place, at random, as another kernel may.

    Other neighbours alone do not always show a model's rounding: on a CPU some shapes give the same bits throughout.
    """
    generators: dict[Any, torch.Generator] = {}  # of its own: training's random state stays as it is

    def move(_: Any, __: Any, out: Any) -> Any:
        if not isinstance(out, Tensor) or not out.is_floating_point():
            return out
        generator = generators.setdefault(out.device, torch.Generator(out.device).manual_seed(0))
        unit = torch.finfo(out.dtype).eps
        if torch.get_float32_matmul_precision() != "highest":
            unit = max(unit, 2.0**-10)  # TF32
        by = torch.rand(out.shape, generator=generator, device=out.device, dtype=torch.float32).sub_(0.5).mul_(unit)
        return (out * by.add_(1)).to(out.dtype)

    hooks = [m.register_forward_hook(move) for m in model.modules() if isinstance(m, torch.nn.Linear)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _logps(model: Any, pairs: Sequence[Pair], collator: PairCollator, device: Any, *, in_head: bool) -> Tensor:
    batch = {name: tensor.to(device) for name, tensor in collator(pairs).items()}
    with torch.no_grad():
        return completion_logps(model, batch, in_head).double().cpu()


def _root_mean_square(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts).square().mean().sqrt()


def settle_layout(
    collator: PairCollator,
    model: Any,
    prompts: Any,
    accelerator: Any,
    *,
    sample_packing: bool | None,
    longest: int,
    images: ImageRows | None = None,
) -> str:
    """Gives a collator the layout that a model takes, on every rank the same.

    Args:
        collator: Of training and of the opponent's pass; changed in place.
        model: The policy as the trainer wraps it; every rank must call.
        prompts: Prompts and human answers, some of which are tried out.
        accelerator: The trainer's.
        sample_packing: The host's key; False asks for padding.
        longest: Most tokens in a prompt with an answer.
        images: Where the prompts' pictures are; None where all is text.

    Returns:
        A line for the log: the layout and why it was chosen.
    """
    policy = bare(model, accelerator)
    # with pictures the host wants no packing
    asked_for = sample_packing if images is None else None
    layout, why = preferred_layout(policy.config, sample_packing=asked_for, longest=longest)
    if images is not None and layout == "packed":
        layout, why = "padded", "a prompt's pictures stand before each of its answers"
    collator.hidden_size = int(getattr(text_config(policy.config), "hidden_size", None) or collator.hidden_size)
    # a compiled forward may pass by hooks that its head got later, for some shapes and not for others
    asked = hasattr(policy, "get_output_embeddings") and not is_compiled_module(model)
    has_head = asked and policy.get_output_embeddings() is not None
    pairs = tried_pairs(prompts, images)

    def ask(question: Callable[..., Any], some: Sequence[Pair], tried: Layout, in_head: bool = False) -> list[float]:
        """Returns a question's figures, the largest of any rank's; infinite where the model does not take the layout."""
        candidate = PairCollator(collator.pad_token_id, tried, hidden_size=10**6)  # all pairs in one row
        candidate.in_head, candidate.in_parts = in_head, False
        figures: Any = float("inf") if question is head_off else (float("inf"), 0.0)
        try:
            with frozen(model):
                figures = question(model, some, candidate, accelerator.device)
        except (TypeError, ValueError, RuntimeError, IndexError, AttributeError) as error:
            without = " without a mask" if question is parts_off else ""
            LOG.warning(f"the model does not take pairs in the {tried} layout{without}: {error}")
        return accelerator.gather(torch.tensor([figures], device=accelerator.device).view(1, -1)).amax(0).tolist()

    def in_head(tried: Layout) -> bool:
        return has_head and ask(head_off, pairs[:LONG], tried)[0] <= _EXACT

    collator.layout, collator.in_head = layout, in_head(layout)
    if layout != "padded":
        off, noise = ask(layout_off, pairs, layout, collator.in_head)
        if not off <= max(_NOISE * noise, _LEAST):
            why = f"{layout}, its log-probs are off by {off:.2g} nats per root of a token (rounding: {noise:.2g})"
            collator.layout, collator.in_head = "padded", in_head("padded")
    attention = text_config(policy.config)._attn_implementation if collator.layout == "shared" else None
    if attention in ("eager", "flex_attention") or is_compiled_module(model):
        # the one adds its mask to all scores, the other has blocks; a graph knows tensors alone
        collator.in_parts = False
    elif attention:
        off, noise = ask(parts_off, pairs[:LONG], "shared", collator.in_head)
        if not off <= max(_NOISE * noise, _LEAST):
            LOG.warning(
                f"long rows have a mask of tokens x tokens: without it log-probs are off by {off:.2g} nats per root of a "
                f"token (rounding: {noise:.2g})"
            )
            collator.in_parts = False
    # a compiled graph runs without the hooks by which rounding is measured
    if collator.layout == "padded" and not is_compiled_module(model):
        off, noise = ask(padding_off, pairs[-LONG:], "padded", collator.in_head)
        if np.isfinite(off) and off > max(_NOISE * noise, _LEAST):
            LOG.warning(
                f"padding moves the model's log-probs by {off:.2g} nats per root of a token (rounding: {noise:.2g}): its "
                "attention does not heed its mask, here as in SFT; try another `attn_implementation` (`eager`)"
            )
    where = "where the LM head gives its logits" if collator.in_head else "from the forward's output"
    if collator.in_head and TiledHead.of(policy.get_output_embeddings()) is None:
        where += ", all of which are held: it is more than linear layers"
    return f"pairs are laid out {collator.layout}: {why}; log-probs are taken {where}"


def _other_tokens(row: Pair, parts: Sequence[str]) -> Pair:
    """Returns a pair with other tokens in some of its parts, none of which stands for a picture."""
    pictures = row["images"].placeholders if "images" in row else ()
    made = dict(row)
    for name in parts:
        ids = np.asarray(row[name])[::-1]
        made[name] = np.where(np.isin(ids // 2, pictures), ids, ids // 2)
    return made
