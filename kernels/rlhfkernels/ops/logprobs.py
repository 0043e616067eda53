"""Log-probabilities (and entropies) of given tokens from hidden states, without the logits of a whole batch.

Positions are handled in chunks: at no time do the logits of more than ``chunk`` positions exist. Where the head is
frozen, the gradient of every log-probability with respect to its hidden state is found in the forward already, while
the chunk's probabilities are there (d log p / d h = scale · (W[token] − Σ p W)), so the head's product is done twice a
step, not three times, and nothing but that gradient is kept.

Shapes: n = positions, d = hidden size, v = vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from rlhfkernels.models.heads import LmHead
from rlhfkernels.ops.forms import takes_native, takes_triton
from rlhfkernels.ops.logit_shape import LogitShape
from rlhfkernels.ops.native import logprobs as native


def token_logprobs_reference(
    hidden: torch.Tensor, head: LmHead, targets: torch.Tensor, *, temperature: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """The plain form: all logits at once, and a log-softmax of them.

    Args:
        hidden: [n, d].
        head: the language-model head.
        targets: [n], int64.
        temperature: divides the logits.

    Returns:
        Log-probabilities [n] and entropies [n], in nats, in float32 or wider.
    """
    logprobs = torch.log_softmax(head(hidden) / temperature, dim=-1)
    picked = logprobs.gather(-1, targets[:, None]).squeeze(-1)
    return picked, -(logprobs.exp() * logprobs).sum(-1)


def token_logprobs(
    hidden: torch.Tensor,
    head: LmHead,
    targets: torch.Tensor,
    *,
    temperature: float = 1.0,
    chunk: int = 128,
    entropy: bool = False,
    kernels: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The chunked form of ``token_logprobs_reference``, with the same gradients.

    Args:
        hidden: [n, d].
        head: the language-model head; its weight gets a gradient if it is trained.
        targets: [n], int64.
        temperature: divides the logits.
        chunk: positions whose logits exist at one time; 0 is all of them, through plain autograd.
        entropy: also return the entropies.
        kernels: as in ``takes_triton``.

    Returns:
        Log-probabilities [n], and entropies [n] or ``None``, in nats, in float32 or wider.
    """
    if chunk == 0:
        logprobs, entropies = token_logprobs_reference(hidden, head, targets, temperature=temperature)
        return logprobs, entropies if entropy else None
    shape = LogitShape(head.scale, head.softcap, temperature)
    outputs = _ChunkedLogprobs.apply(  # type: ignore[no-untyped-call]
        hidden,
        head.weight,
        head.bias,
        targets,
        shape,
        chunk,
        entropy,
        _form(hidden, shape, kernels, entropy=entropy),
    )
    return outputs if entropy else (outputs[0], None)


class _Form(NamedTuple):
    """What is done with a chunk: see ``read`` and ``slope``."""

    read: Callable[..., None]
    slope: Callable[..., torch.Tensor]


def _form(hidden: torch.Tensor, shape: LogitShape, kernels: str, *, entropy: bool) -> _Form:
    if takes_triton(hidden, kernels):
        from rlhfkernels.ops.triton import logprobs as form

        return _Form(form.read, form.slope)
    if takes_native(kernels, hidden) and native.covers(shape, entropy=entropy):
        return _Form(native.read, native.slope)
    return _Form(read, slope)


class _ChunkedLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        shape: LogitShape,
        chunk: int,
        with_entropy: bool,
        form: _Form,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        n = hidden.shape[0]
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        logprobs = hidden.new_empty(n, dtype=wide)
        entropies = hidden.new_empty(n, dtype=wide) if with_entropy else None
        hidden_needed, weight_needed, bias_needed = ctx.needs_input_grad[:3]
        # With a trained head the probabilities are needed once more, for its own gradient: keep what remakes them.
        eager = hidden_needed and not (weight_needed or bias_needed)
        slopes = [torch.empty_like(hidden) for _ in range(1 + with_entropy)] if eager else []
        for start in range(0, n, chunk):
            rows = slice(start, start + chunk)
            form.read(
                shape,
                hidden[rows],
                weight,
                bias,
                targets[rows],
                logprobs[rows],
                None if entropies is None else entropies[rows],
                [slope[rows] for slope in slopes],
            )
        ctx.shape, ctx.chunk, ctx.eager, ctx.with_entropy, ctx.form = shape, chunk, eager, with_entropy, form
        if eager:
            ctx.save_for_backward(*slopes)
        elif any(ctx.needs_input_grad[:3]):
            ctx.save_for_backward(hidden, weight, bias, targets, entropies)
        return logprobs, entropies

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        grad_logprobs = grads[0]
        grad_entropies = grads[1] if ctx.with_entropy else None
        empty: tuple[None, ...] = (None,) * 5
        if ctx.eager:
            slopes = ctx.saved_tensors
            grad_hidden = slopes[0] * grad_logprobs[:, None].to(slopes[0].dtype)
            if grad_entropies is not None:
                grad_hidden += slopes[1] * grad_entropies[:, None].to(slopes[1].dtype)
            return grad_hidden, None, None, *empty
        hidden, weight, bias, targets, entropies = ctx.saved_tensors
        hidden_needed, weight_needed, bias_needed = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty_like(hidden) if hidden_needed else None
        grad_weight = torch.zeros_like(weight) if weight_needed else None
        grad_bias = torch.zeros_like(bias) if bias_needed else None
        for start in range(0, hidden.shape[0], ctx.chunk):
            rows = slice(start, start + ctx.chunk)
            grad = ctx.form.slope(
                ctx.shape,
                hidden[rows],
                weight,
                bias,
                targets[rows],
                None if grad_entropies is None else entropies[rows],
                grad_logprobs[rows],
                None if grad_entropies is None else grad_entropies[rows],
            )
            if grad_hidden is not None:
                grad_hidden[rows] = grad @ weight
            if grad_weight is not None:
                grad_weight.addmm_(grad.t(), hidden[rows])
            if grad_bias is not None:
                grad_bias += grad.sum(0)
        return grad_hidden, grad_weight, grad_bias, *empty


def read(
    shape: LogitShape,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    logprobs: torch.Tensor,
    entropies: torch.Tensor | None,
    slopes: list[torch.Tensor],
) -> None:
    """Fills in what is asked of a chunk, without a graph.

    Args:
        shape: how its products become logits.
        hidden: [n, d].
        weight: [v, d].
        bias: [v] or ``None``.
        targets: [n].
        logprobs: [n], filled in.
        entropies: [n], filled in, or ``None``.
        slopes: the gradients of the log-probabilities, and of the entropies where these are asked for, with respect to
            the hidden states, [n, d] each, filled in; or none.
    """
    logits = shape.logits(hidden, weight, bias)
    logits -= torch.logsumexp(logits, -1, keepdim=True)
    logprobs.copy_(logits.gather(-1, targets[:, None]).squeeze(-1))
    if entropies is not None:
        entropies.copy_(-(logits.exp() * logits).sum(-1))
    if slopes:
        raw = shape.logits(hidden, weight, bias) if shape.softcap is not None else logits
        if entropies is not None:
            grad = _entropy_slope(logits, entropies)
            slopes[1].copy_(shape.backward_(grad, raw).to(hidden.dtype) @ weight)
            del grad
        grad = shape.backward_(_logprob_slope(logits, targets), raw)
        slopes[0].copy_(grad.to(hidden.dtype) @ weight)


def slope(
    shape: LogitShape,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    entropies: torch.Tensor | None,
    grad_logprobs: torch.Tensor,
    grad_entropies: torch.Tensor | None,
) -> torch.Tensor:
    """The gradient of a chunk's raw products [n, v], in their dtype, without a graph.

    Args:
        shape: how its products become logits.
        hidden: [n, d].
        weight: [v, d].
        bias: [v] or ``None``.
        targets: [n].
        entropies: [n], where they have a gradient.
        grad_logprobs: [n].
        grad_entropies: [n] or ``None``.
    """
    logits = shape.logits(hidden, weight, bias)
    logprobs = torch.log_softmax(logits, dim=-1)
    grad = _logprob_slope(logprobs, targets).mul_(grad_logprobs[:, None])
    if grad_entropies is not None:
        assert entropies is not None
        grad += _entropy_slope(logprobs, entropies).mul_(grad_entropies[:, None])
    return shape.backward_(grad, logits).to(hidden.dtype)


def _logprob_slope(logprobs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """d log p[target] / d logits = onehot − p, [n, v]."""
    slope = logprobs.exp().neg_()
    return slope.scatter_add_(-1, targets[:, None], torch.ones_like(slope[:, :1]))


def _entropy_slope(logprobs: torch.Tensor, entropies: torch.Tensor) -> torch.Tensor:
    """d H / d logits = −p · (log p + H), [n, v]."""
    return logprobs.exp().mul_(logprobs + entropies[:, None]).neg_()
