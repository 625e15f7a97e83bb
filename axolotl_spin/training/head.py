"""The LM head: what a model does to its logits, and log-probs without holding them.

Logits of all answer tokens over the whole vocabulary are the largest tensor of a step with a large vocabulary. Where they
would take more than `_HELD` bytes, the head gives log-probs right away: a tile of the vocabulary at a time, and the same
again in the backward pass. That costs a third product of the head's more, and holds nothing of the size of the logits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# fp32 numbers that exist at once while log-probs are computed: 64 MiB
_CHUNK = 16 * 2**20
# bytes of logits above which they are not held between forward and backward pass
_HELD = 256 * 2**20


class Change(NamedTuple):
    """What a model does to the logits that its head gives, in this order; nothing where a field is None.

    Attributes:
        factor: They are multiplied by it (`logit_scale` of Cohere, `lm_head_multiplier` of Falcon-H1).
        divisor: They are divided by it (`logits_scaling` of Granite).
        cap: They become `cap * tanh(logits / cap)` (`final_logit_softcapping` of Gemma 2).
    """

    factor: float | None = None
    divisor: float | None = None
    cap: float | None = None

    def __call__(self, logits: Tensor) -> Tensor:
        """Returns the model's logits, rounded as the model rounds them: in their own precision, operation by operation."""
        if self.factor is not None:
            logits = logits * self.factor
        if self.divisor is not None:
            logits = logits / self.divisor
        return logits if self.cap is None else torch.tanh(logits / self.cap) * self.cap

    def slope(self, changed: Tensor) -> Tensor | float:
        """Returns the derivative by the head's logits, at what they became (fp32)."""
        slope = (1.0 if self.factor is None else self.factor) / (1.0 if self.divisor is None else self.divisor)
        return slope if self.cap is None else (1 - (changed / self.cap).square_()).mul_(slope)


def logit_change(config: Any) -> Change:
    """Returns what a model's config says of its logits; whether it is all is for numbers to tell (`layout_check`).

    Args:
        config: Of the model's text part.
    """

    def number(*names: str) -> float | None:
        found = [getattr(config, name, None) for name in names]
        return next((float(value) for value in found if isinstance(value, (int, float)) and value), None)

    return Change(
        number("logit_scale", "lm_head_multiplier"), number("logits_scaling"), number("final_logit_softcapping")
    )


def logits_held(tokens: int, vocabulary: int, width: int) -> int:
    """Returns the bytes of logits that a step holds at once where its head can be taken in tiles.

    Args:
        tokens: Positions that reach the head.
        vocabulary: Its size.
        width: Bytes of a number.
    """
    whole = tokens * vocabulary * width
    return whole if whole <= _HELD else 3 * 4 * _CHUNK  # a tile in the head's precision, in fp32, and its slope


class Product(NamedTuple):
    """A linear map in a head, whose results add up to the logits.

    Attributes:
        given: (tokens, size) what it is given.
        weight: (vocabulary, size).
    """

    given: Tensor
    weight: Tensor


class TiledHead:
    """A head whose logits need not be held, since its products can be taken a tile at a time.

    Args:
        module: What gives the logits: a linear layer, or PEFT's low-rank layer around one.
    """

    def __init__(self, module: Any):
        self._module = module
        self._linear = getattr(module, "base_layer", module)

    @classmethod
    def of(cls, head: Any) -> TiledHead | None:
        """Returns the tiled form of a model's output embeddings.

        None where something else than linear layers gives the logits (a quantised layer, DoRA), or where a wrapper's hooks
        would not have all weights at hand at once (low-rank weights that ZeRO-3 has partitioned).
        """
        if hasattr(head, "modules_to_save") and hasattr(
            head, "active_adapters"
        ):  # PEFT trains a copy of the whole head
            head = next(
                (head.modules_to_save[name] for name in head.active_adapters if name in head.modules_to_save), None
            )
        if _is_linear(head):
            return cls(head)
        if not (hasattr(head, "lora_A") and _is_linear(getattr(head, "base_layer", None)) and not head.merged):
            return None
        names = [name for name in head.active_adapters if name in head.lora_A]
        plain = not any(getattr(head, "lora_variant", {}).get(name) for name in names)
        parts = [layer[name] for layer in (head.lora_A, head.lora_B) for name in names]
        partitioned = any(hasattr(weight, "ds_id") for weight in head.parameters())
        return cls(head) if plain and not partitioned and all(map(_is_linear, parts)) else None

    def pays(self, tokens: int) -> bool:
        """Whether the logits of so many positions are too large to be held.

        The same batch gives the same answer, so that policy and opponent are rounded alike.
        """
        whole = tokens * self._linear.out_features * self._linear.weight.dtype.itemsize
        return whole > _HELD

    @contextmanager
    def giving(self, values: Callable[[list[Product], Tensor | None], Tensor]) -> Iterator[None]:
        """Has the head give other values than its logits, within its own forward: wrappers gather its weight as ever.

        Args:
            values: From its products and its bias.
        """
        self._module.forward = lambda hidden: values(self._products(hidden[0]), self._linear.bias)
        try:
            yield
        finally:
            del self._module.forward

    def _products(self, hidden: Tensor) -> list[Product]:
        """Returns the products that (tokens, hidden size) take part in."""
        found = [Product(hidden, self._linear.weight)]
        if self._module is not self._linear:
            layer = self._module
            for name in (name for name in layer.active_adapters if name in layer.lora_A):
                low = layer.lora_A[name](hidden.to(layer.lora_A[name].weight.dtype)) * layer.scaling[name]
                found.append(Product(low, layer.lora_B[name].weight))
        return found


def _is_linear(module: Any) -> bool:
    """Whether a module is a linear layer whose forward nobody has replaced."""
    plain = isinstance(module, torch.nn.Linear) and type(module).forward is torch.nn.Linear.forward
    return plain and "forward" not in vars(module)


class _TiledLogps(torch.autograd.Function):
    """log softmax(change(sum of given @ weight.T, + bias))[target] in fp32, a tile of the vocabulary at a time."""

    @staticmethod
    def forward(ctx: Any, targets: Tensor, change: Change, bias: Tensor | None, *products: Tensor) -> Tensor:
        hidden = products[0]
        kind = hidden.device.type
        # what autocast would have the products computed in; there is no autocast in the backward pass
        ctx.dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
        ctx.change = change
        normalizer = hidden.new_full(targets.shape, -torch.inf, dtype=torch.float32)
        chosen = torch.zeros_like(normalizer)
        for start, part in _tiles(ctx, bias, products):
            normalizer = torch.logaddexp(normalizer, part.logsumexp(-1))
            here = (targets >= start) & (targets < start + part.shape[-1])
            picked = part.gather(-1, (targets - start).clamp(0, part.shape[-1] - 1)[:, None]).squeeze(-1)
            chosen = torch.where(here, picked, chosen)
        ctx.save_for_backward(targets, normalizer, bias, *products)
        return chosen - normalizer

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        targets, normalizer, bias, *products = ctx.saved_tensors
        needs_bias, *needs = ctx.needs_input_grad[2:]
        grad_bias = torch.empty_like(bias) if needs_bias else None
        # sums over the vocabulary add up in fp32; a weight's rows are each written once
        grads = [
            torch.zeros_like(tensor, dtype=torch.float32 if place % 2 == 0 else tensor.dtype) if need else None
            for place, (tensor, need) in enumerate(zip(products, needs, strict=True))
        ]
        for start, part in _tiles(ctx, bias, products):
            rows = slice(start, start + part.shape[-1])
            slope = ctx.change.slope(part)
            here = torch.nonzero((targets >= rows.start) & (targets < rows.stop)).squeeze(-1)
            part.sub_(normalizer[:, None]).exp_().mul_(-grad[:, None])
            part[here, targets[here] - start] += grad[here]
            part = part.mul_(slope).to(ctx.dtype)
            if grad_bias is not None:
                grad_bias[rows] = part.sum(0)
            for given, weight, of_given, of_weight in zip(
                products[::2], products[1::2], grads[::2], grads[1::2], strict=True
            ):
                if of_given is not None:
                    of_given += part @ weight[rows].to(ctx.dtype)
                if of_weight is not None:
                    of_weight[rows] = (part.T @ given.to(ctx.dtype)).to(weight.dtype)
        typed = [found if found is None else found.to(of.dtype) for found, of in zip(grads, products, strict=True)]
        return None, None, grad_bias, *typed


def _tiles(ctx: Any, bias: Tensor | None, products: Sequence[Tensor]) -> Iterator[tuple[int, Tensor]]:
    """Yields where each tile of the vocabulary starts, and the model's logits in it, (tokens, tile) in fp32."""
    size = max(1, _CHUNK // len(products[0]))
    given = [tensor.to(ctx.dtype) for tensor in products[::2]]
    with torch.autocast(products[0].device.type, enabled=False):
        for start in range(0, len(products[1]), size):
            rows = slice(start, start + size)
            logits = F.linear(
                given[0], products[1][rows].to(ctx.dtype), None if bias is None else bias[rows].to(ctx.dtype)
            )
            for more, weight in zip(given[1:], products[3::2], strict=True):
                logits = logits + F.linear(more, weight[rows].to(ctx.dtype))
            yield start, ctx.change(logits).float()


def tiled_logps(
    products: Sequence[Product], bias: Tensor | None, targets: Tensor, change: Change | None = None
) -> Tensor:
    """Returns the log-prob of each target under a linear head, without its logits.

    Args:
        products: What adds up to the logits.
        bias: (vocabulary,) or None.
        targets: (tokens,) ids.
        change: What the model does to its logits.

    Returns:
        (tokens,) log-probs in nats, fp32.
    """
    flat = [tensor for product in products for tensor in product]
    return _TiledLogps.apply(targets, change or Change(), bias, *flat)


class _SelectedLogps(torch.autograd.Function):
    """log softmax(change(logits))[target] in fp32, a chunk of tokens at a time, forward and backward."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, change: Change, overwrite: bool) -> Tensor:
        chunk = max(1, _CHUNK // logits.shape[-1])
        normalizers, chosen = [], []
        for part, target in zip(logits.split(chunk), targets.split(chunk), strict=True):
            part = change(part)
            normalizers.append(part.float().logsumexp(-1))
            chosen.append(part.gather(-1, target[:, None]).squeeze(-1).float())
        normalizer = torch.cat(normalizers)
        ctx.save_for_backward(logits, targets, normalizer)
        ctx.change, ctx.overwrite = change, overwrite
        return torch.cat(chosen) - normalizer

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        logits, targets, normalizer = ctx.saved_tensors
        chunk = max(1, _CHUNK // logits.shape[-1])
        gradient = logits.detach() if ctx.overwrite else torch.empty_like(logits)
        for start in range(0, len(logits), chunk):
            rows = slice(start, start + chunk)
            part = ctx.change(logits[rows]).float()
            slope = ctx.change.slope(part)
            part = torch.sub(part, normalizer[rows, None]).exp_().mul_(-grad[rows, None])
            part.scatter_add_(-1, targets[rows, None], grad[rows, None])
            gradient[rows] = part.mul_(slope)
        return gradient, None, None, None


def selected_logps(logits: Tensor, targets: Tensor, change: Change | None = None, overwrite: bool = False) -> Tensor:
    """Returns the log-prob of each target, computed in fp32 without an fp32 copy of all logits.

    Args:
        logits: (tokens, vocabulary), of any floating type.
        targets: (tokens,) ids.
        change: What is still to be done to the logits.
        overwrite: The backward pass writes the gradient where the logits are. Nothing else may need them, and it runs
            once.

    Returns:
        (tokens,) log-probs in nats, fp32.
    """
    return _SelectedLogps.apply(logits, targets, change or Change(), overwrite)
