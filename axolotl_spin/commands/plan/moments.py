"""What a training step holds beside weights and optimizer state at its highest moment.

Four moments can be the highest: when the head has given its log-probs, in the backward pass of a decoder layer's MLP, in
that of a tower for pictures, and under FSDP2 when the gradients of the embeddings are reduced. The
figures are of a decoder layer with RMSNorm, attention by a kernel and a gated MLP, as transformers has it;
`tests/benchmarks/simulation.py` has PyTorch's tracker count the same.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Holding:
    """What decides how much a step holds.

    Attributes:
        tokens: Of a micro-batch.
        layers, hidden, inner: Of the decoder: its layers, and the width of their input and of their MLP.
        layer, outside: Parameters of one decoder layer, and of all that is in none, towers among it.
        share: Of the gradients, what is of decoder layers: from 0 to 1.
        head: Parameters of the LM head.
        width: Bytes of a number in the forward pass.
        logits: Bytes of logits that exist at once.
        adapter: Whether an adapter is trained and the model frozen.
        checkpointing: Whether a layer's activations are computed again in the backward pass.
        gathered: Whether FSDP2 gathers weights for a layer at a time.
        resharded: Whether it lets go of them after a layer's forward, or keeps them until its backward pass.
        gradients: Bytes of gradients that are kept between backward pass and optimizer step.
        accumulated: Whether they are there from an earlier micro-batch.
        pictures, again: See `towers.Pictures`.
    """

    tokens: int
    layers: int
    hidden: int
    inner: int
    layer: float
    outside: float
    share: float
    head: int
    width: int
    logits: int
    adapter: bool
    checkpointing: bool
    gathered: bool
    resharded: bool
    gradients: float
    accumulated: bool
    pictures: int = 0
    again: int = 0


def held(step: Holding) -> float:
    """Returns bytes of activations, and of weights and gradients that exist for a moment, beside the kept gradients.

    The gradients of layers are made while their activations go, so that not all of both are there at once.
    """
    w, row = step.width, step.tokens * step.hidden
    mlp = step.tokens * step.inner
    # for each of the two norms its input in fp32, what it normalises and what it gives; queries, keys, values, what the
    # attention gives; in the MLP both projections, the activation and the product. A frozen norm keeps one less
    kept = 8 * row + w * ((6 if step.adapter else 8) * row + 4 * mlp)
    # the gradients of the layer's output, of the product and of its two factors, once the product itself is gone
    beside = w * (row + 2 * mlp)
    left = w * row if step.checkpointing else kept  # of each layer, from its forward to its backward pass
    alone = kept + beside if step.checkpointing else beside
    of_layers = 0.0 if step.adapter else step.gradients * step.share
    layer = outside = head = whole = 0.0
    if step.gathered:
        # the next layer's weights are gathered meanwhile; of what is trained, the last one's gradients are reduced, and the
        # first of the MLP's are there
        outside = w * step.outside
        layer = w * step.layer * 2 if step.adapter else w * (3 * step.layer + step.hidden * step.inner)
        head = 0.0 if step.adapter else w * step.head
        whole = 0.0 if step.resharded else w * step.layers * step.layer
    start, end = step.layers * left + step.pictures, left + of_layers + step.pictures
    before = step.gradients if step.accumulated else 0.0
    at_head = outside + head + whole + start + step.logits + before
    others = max(0.0, whole - 2 * w * step.layer)  # two layers' weights are counted with the first that goes back
    in_a_layer = outside + head + layer + alone + max(others + start + before, end)
    at_embeddings = 2 * outside + w * step.layer + of_layers if step.gathered and not step.adapter else 0.0
    at_pictures = outside + step.pictures + step.again + step.gradients if step.pictures else 0.0
    return max(at_head, in_a_layer, at_embeddings, at_pictures, step.gradients) - step.gradients
