"""Log-probabilities and entropies of given tokens from hidden states, in chunks of positions.

The logits of at most ``chunk`` positions exist at a time. With a frozen head, the forward also computes the gradient of
every log-probability with respect to its hidden state (d log p / d h = scale · (W[token] − Σ p W)) and keeps only that:
the head's matmul runs twice a step instead of three times.

Shapes: n = positions, d = hidden size, v = vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from rlhfkernels.ops.dispatch import takes_native, takes_triton
from rlhfkernels.ops.logit_transform import LogitTransform, scale_and_cap
from rlhfkernels.ops.native import token_logprobs as native

# Rows of a head's weight whose gradient exists twice at a time while chunks are added up in a wider dtype: at d = 4096
# in bfloat16 32 MiB, in place of 250 MiB for the 32,000 rows of Llama.
_ACCUMULATED_ROWS = 4096


def token_logprobs_reference(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    transform: LogitTransform,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes all logits at once and their log-softmax.

    Args:
        hidden: [n, d].
        weight: [v, d], of the head.
        bias: [v] or ``None``.
        targets: [n], int64.
        transform: from the head's raw outputs to logits.

    Returns:
        Log-probabilities [n] and entropies [n], in nats, in float32 or wider.
    """
    logits = scale_and_cap(nn.functional.linear(hidden, weight, bias), transform.scale, transform.softcap)
    logprobs = torch.log_softmax(logits / transform.temperature, dim=-1)
    return logprobs.gather(-1, targets[:, None]).squeeze(-1), -(logprobs.exp() * logprobs).sum(-1)


def token_logprobs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    transform: LogitTransform,
    *,
    chunk: int = 128,
    entropy: bool = False,
    backend: str = "auto",
    grad_dtype: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Log-probabilities of given tokens from hidden states, with at most ``chunk`` positions' logits in memory.

    Values and gradients are those of the log-softmax of all logits at once.

    Args:
        hidden: [n, d].
        weight: [v, d], of the head; gets a gradient if it is trained.
        bias: [v] or ``None``.
        targets: [n], int64.
        transform: from the head's raw outputs to logits.
        chunk: positions whose logits exist at a time; 0 is all of them, by plain autograd.
        entropy: also return the entropies.
        backend: ``torch``, ``triton`` or ``native``; ``auto`` is Triton for CUDA tensors where it is installed, else
            torch.
        grad_dtype: dtype in which the gradients of ``weight`` and ``bias`` are added up over several chunks, at least
            their own. Over 256 chunks the error is 1.3 times that of one rounding in float32, 13 times in bfloat16.

    Returns:
        Log-probabilities [n], and entropies [n] or ``None``, in nats, in float32 or wider.

    Example:
        >>> hidden, weight, targets = torch.zeros(2, 4), torch.ones(8, 4), torch.tensor([0, 7])
        >>> token_logprobs(hidden, weight, None, targets, LogitTransform(), backend="torch")[0]  # -ln 8
        tensor([-2.0794, -2.0794])
    """
    if chunk == 0:
        logprobs, entropies = token_logprobs_reference(hidden, weight, bias, targets, transform)
        return logprobs, entropies if entropy else None
    kernels = _kernels(hidden, transform, backend, entropy=entropy)
    outputs = _ChunkedLogprobs.apply(  # type: ignore[no-untyped-call]
        hidden, weight, bias, targets, transform, chunk, entropy, kernels, grad_dtype
    )
    return outputs if entropy else (outputs[0], None)


class _Kernels(NamedTuple):
    """Functions of a backend for one chunk: see ``forward`` and ``backward``."""

    forward: Callable[..., None]
    backward: Callable[..., torch.Tensor]


def _kernels(hidden: torch.Tensor, transform: LogitTransform, backend: str, *, entropy: bool) -> _Kernels:
    if takes_triton(hidden, backend):
        from rlhfkernels.ops.triton import token_logprobs as triton

        return _Kernels(triton.forward, triton.backward)
    if takes_native(backend, hidden) and native.supports(transform, entropy=entropy):
        return _Kernels(native.forward, native.backward)
    return _Kernels(forward, backward)


class _ChunkedLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        transform: LogitTransform,
        chunk: int,
        with_entropy: bool,
        kernels: _Kernels,
        grad_dtype: torch.dtype,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        n = hidden.shape[0]
        wide = torch.promote_types(hidden.dtype, torch.float32)
        logprobs = hidden.new_empty(n, dtype=wide)
        entropies = hidden.new_empty(n, dtype=wide) if with_entropy else None
        hidden_needed, weight_needed, bias_needed = ctx.needs_input_grad[:3]
        # The gradient of a trained head needs the probabilities again: then keep the inputs and recompute.
        eager = hidden_needed and not (weight_needed or bias_needed)
        gradients = [torch.empty_like(hidden) for _ in range(1 + with_entropy)] if eager else []
        for start in range(0, n, chunk):
            rows = slice(start, start + chunk)
            kernels.forward(
                transform,
                hidden[rows],
                weight,
                bias,
                targets[rows],
                logprobs[rows],
                None if entropies is None else entropies[rows],
                [gradient[rows] for gradient in gradients],
            )
        ctx.transform, ctx.chunk, ctx.eager, ctx.with_entropy = transform, chunk, eager, with_entropy
        ctx.kernels, ctx.grad_dtype = kernels, torch.promote_types(weight.dtype, grad_dtype)
        if eager:
            ctx.save_for_backward(*gradients)
        elif any(ctx.needs_input_grad[:3]):
            ctx.save_for_backward(hidden, weight, bias, targets, entropies)
        return logprobs, entropies

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        grad_logprobs = grads[0]
        grad_entropies = grads[1] if ctx.with_entropy else None
        no_grads: tuple[None, ...] = (None,) * 6
        if ctx.eager:
            gradients = ctx.saved_tensors
            grad_hidden = gradients[0] * grad_logprobs[:, None].to(gradients[0].dtype)
            if grad_entropies is not None:
                grad_hidden += gradients[1] * grad_entropies[:, None].to(gradients[1].dtype)
            return grad_hidden, None, None, *no_grads
        hidden, weight, bias, targets, entropies = ctx.saved_tensors
        hidden_needed, weight_needed, bias_needed = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty_like(hidden) if hidden_needed else None
        # One chunk is rounded once anyway. Autograd rounds the result where the gradient's own dtype is narrower.
        dtype = ctx.grad_dtype if hidden.shape[0] > ctx.chunk else weight.dtype
        grad_weight = torch.zeros_like(weight, dtype=dtype) if weight_needed else None
        grad_bias = torch.zeros_like(bias, dtype=dtype) if bias_needed else None
        for start in range(0, hidden.shape[0], ctx.chunk):
            rows = slice(start, start + ctx.chunk)
            grad_raw = ctx.kernels.backward(
                ctx.transform,
                hidden[rows],
                weight,
                bias,
                targets[rows],
                None if grad_entropies is None else entropies[rows],
                grad_logprobs[rows],
                None if grad_entropies is None else grad_entropies[rows],
            )
            if grad_hidden is not None:
                grad_hidden[rows] = grad_raw @ weight
            if grad_weight is not None:
                _add_matmul_(grad_weight, grad_raw.t(), hidden[rows])
            if grad_bias is not None:
                grad_bias += grad_raw.sum(0, dtype=dtype)
        return grad_hidden, grad_weight, grad_bias, *no_grads


def _add_matmul_(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """Computes ``total += left @ right``; a wider ``total`` in blocks of rows, whose matmuls are all that is added."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
        return
    for block, rows in zip(torch.split(total, _ACCUMULATED_ROWS), torch.split(left, _ACCUMULATED_ROWS), strict=True):
        block += rows @ right


def forward(
    transform: LogitTransform,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    logprobs: torch.Tensor,
    entropies: torch.Tensor | None,
    gradients: list[torch.Tensor],
) -> None:
    """Writes the results of a chunk, without a graph.

    Args:
        transform: from raw outputs to logits.
        hidden: [n, d].
        weight: [v, d].
        bias: [v] or ``None``.
        targets: [n].
        logprobs: [n], overwritten.
        entropies: [n], overwritten, or ``None``.
        gradients: gradients of the log-probabilities, and of the entropies if wanted, with respect to the hidden
            states, [n, d] each, overwritten; may be empty.
    """
    logits = transform.logits(hidden, weight, bias)
    logits -= torch.logsumexp(logits, -1, keepdim=True)
    logprobs.copy_(logits.gather(-1, targets[:, None]).squeeze(-1))
    if entropies is not None:
        entropies.copy_(-(logits.exp() * logits).sum(-1))
    if gradients:
        # ``logits`` holds log-probabilities by now, and only the gradient of a cap reads the logits.
        capped = logits if transform.softcap is None else transform.logits(hidden, weight, bias)
        if entropies is not None:
            grad = _entropy_gradient(logits, entropies)
            gradients[1].copy_(transform.backward_(grad, capped).to(hidden.dtype) @ weight)
            del grad
        grad = transform.backward_(_logprob_gradient(logits, targets), capped)
        gradients[0].copy_(grad.to(hidden.dtype) @ weight)


def backward(
    transform: LogitTransform,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    entropies: torch.Tensor | None,
    grad_logprobs: torch.Tensor,
    grad_entropies: torch.Tensor | None,
) -> torch.Tensor:
    """Returns the gradient of a chunk's raw outputs [n, v], in their dtype, without a graph.

    Args:
        transform: from raw outputs to logits.
        hidden: [n, d].
        weight: [v, d].
        bias: [v] or ``None``.
        targets: [n].
        entropies: [n], if they have a gradient.
        grad_logprobs: [n].
        grad_entropies: [n] or ``None``.
    """
    logits = transform.logits(hidden, weight, bias)
    logprobs = torch.log_softmax(logits, dim=-1)
    grad = _logprob_gradient(logprobs, targets).mul_(grad_logprobs[:, None])
    if grad_entropies is not None:
        assert entropies is not None
        grad += _entropy_gradient(logprobs, entropies).mul_(grad_entropies[:, None])
    return transform.backward_(grad, logits).to(hidden.dtype)


def _logprob_gradient(logprobs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Returns d log p[target] / d logits = onehot − p, [n, v]."""
    gradient = logprobs.exp().neg_()
    return gradient.scatter_add_(-1, targets[:, None], torch.ones_like(gradient[:, :1]))


def _entropy_gradient(logprobs: torch.Tensor, entropies: torch.Tensor) -> torch.Tensor:
    """Returns d H / d logits = −p · (log p + H), [n, v]."""
    return logprobs.exp().mul_(logprobs + entropies[:, None]).neg_()
