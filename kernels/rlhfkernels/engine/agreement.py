"""The check of a loaded model: the engine's trunk, head and decoding against transformers' own forward.

Shapes: b = batch, t = positions, d = hidden size, v = vocabulary.
"""

from __future__ import annotations

import math

import torch

from rlhfkernels.engine.trunk import Trunk
from rlhfkernels.errors import CaseError, ModelError, NumericalError
from rlhfkernels.models.configuration import rotary_limit
from rlhfkernels.models.errors import forward_errors
from rlhfkernels.models.loading import LoadedModel
from rlhfkernels.observer import Observer
from rlhfkernels.ops.attention_mask import Segment

# Largest error as a fraction of the range of the compared values. In bfloat16, over 16 models (13 small ones of 2
# layers, tiny, SmolLM2-135M with random and with real weights) and 2 to 5 seeds, values are off by 0.038 at most (the
# real weights, padded rows) and gradients by 0.125, where ours is off float32's by 0.077 and PEFT's by 0.066.
TOLERANCES = {"float64": 1e-5, "float32": 3e-4, "bfloat16": 0.1}
GRADIENT_TOLERANCES = {**TOLERANCES, "bfloat16": 0.25}
_NUM_DECODED = 2
# Of the two sequences that the check of packing puts into one row.
_PACKED_LENGTHS = 3, 4


def tolerance(reference: torch.Tensor, dtype: str, *, of_gradient: bool = False) -> float:
    """Returns the largest error that ``dtype`` explains.

    Log-probabilities of a model with random weights differ little among themselves, so their range gives the scale:
    with a constant tolerance, a wrong head would pass.

    Args:
        reference: [..., n], the correct values. The range is over the last dimension.
        dtype: of the weights.
        of_gradient: the values are a gradient, which sums rounding errors over all positions.
    """
    span = float((reference.amax(-1) - reference.amin(-1)).max())
    tolerances = GRADIENT_TOLERANCES if of_gradient else TOLERANCES
    return tolerances[dtype] * max(span, 0.01 * float(reference.abs().max()))


def largest_error(found: torch.Tensor, reference: torch.Tensor) -> float:
    """Returns max |found − reference|; not finite where either is not."""
    return float((found - reference).abs().max())


def typical_error(found: torch.Tensor, reference: torch.Tensor) -> float:
    """Returns the median over positions of max |found − reference|; NaN where one is.

    A token that sees another changes with it. In a mixture of experts a few others do too, by rounding: their experts
    read another number of tokens.

    Args:
        found: [..., d].
        reference: [..., d].
    """
    return float((found - reference).abs().amax(-1).float().cpu().median())


def wide_log_softmax(logits: torch.Tensor) -> torch.Tensor:
    """Log-probabilities [..., v] in float32 or wider."""
    return torch.log_softmax(logits if logits.dtype == torch.float64 else logits.float(), -1)


@torch.no_grad()
def check_model(name: str, model: LoadedModel, trunk: Trunk, dtype: str, *, generates: bool) -> None:
    """Compares trunk, head and, if the method generates, decoding with the probe of ``model``, and drops the probe.

    Args:
        name: of the model, as the case has it.
        model: one with a probe.
        trunk: of the model, its adapters fresh.
        dtype: of the weights.
        generates: whether the method decodes with a KV cache.

    Raises:
        ModelError: they disagree, or a forward pass fails.
        NumericalError: transformers' own output is not finite.
    """
    probe, model.probe = model.probe, None
    assert probe is not None
    expected = wide_log_softmax(probe.output) if model.lm_head is not None else probe.output
    if not bool(expected.isfinite().all()):
        raise NumericalError(f"model {name!r} gives values that are not finite in {dtype}.")
    with forward_errors(name, type(model.trunk).__name__):
        found = {"the full forward": _read(model, trunk.hidden(None, probe.tokens, None))}
        if generates and model.lm_head is not None and probe.tokens.shape[1] > _NUM_DECODED:
            found["decoding"] = _read(model, decode(trunk, probe.tokens, None, num_decoded=_NUM_DECODED))
    for what, output in found.items():
        reference = expected[:, -output.shape[1] :]
        error, limit = largest_error(output, reference), tolerance(reference, dtype)
        if not error <= limit:
            raise ModelError(
                f"model {name!r} is run wrongly: {what} ({trunk.name} trunk) and transformers' own forward disagree by "
                f"{_shown(error)}; the tolerance of {dtype} is {limit:.2g}."
            )


@torch.no_grad()
def check_causality(name: str, model: LoadedModel, trunk: Trunk, dtype: str) -> None:
    """Refuses a model whose hidden states depend on later tokens, which the loss asks them to predict.

    Args:
        name: of the model, as the case has it.
        model: one with a probe.
        trunk: of the model, its adapters fresh.
        dtype: of the weights.

    Raises:
        ModelError: they do, or a forward pass fails.
    """
    assert model.probe is not None
    tokens, class_name = model.probe.tokens, type(model.trunk).__name__
    other = tokens.clone()
    other[:, -1].add_(1).remainder_(model.vocab_size)
    with forward_errors(name, class_name):
        # Rows of one batch meet the same kernels: what equal rows differ by is rounding.
        states, again, moved = trunk.hidden(None, torch.cat([tokens, tokens, other]), None)[:, :-1].unbind()
    if typical_error(moved, states) > tolerance(states, dtype) / 100 + 10 * typical_error(again, states):
        raise ModelError(f"model {name!r} reads later tokens ({class_name}): it must be causal.")


def check_cache(name: str, model: LoadedModel, seq_len: int) -> None:
    """Refuses lengths at which cached keys go stale.

    Args:
        name: of the model, as the case has it.
        model: the model.
        seq_len: prompt and completion.

    Raises:
        ModelError: the rotary embedding changes within ``seq_len`` positions.
    """
    limit = rotary_limit(model.trunk.config)
    if limit is not None and seq_len > limit:
        raise ModelError(
            f"prompt_len + completion_len is {seq_len}: the rotary embedding of model {name!r} changes beyond {limit} "
            "positions, where cached keys would be stale."
        )


@torch.no_grad()
def check_packing(name: str, trunk: Trunk, dtype: str, *, device: str, max_length: int, vocab_size: int) -> None:
    """Compares two sequences in a packed row with each alone, and with the row whose first sequence is another.

    Args:
        name: of the model, as the case has it.
        trunk: of the model.
        dtype: of the weights.
        device: of the weights.
        max_length: of a sequence.
        vocab_size: token ids are below it.

    Raises:
        CaseError: a sequence sees the one before it, has other positions than alone, or the model takes no packed row.
    """
    segments = [Segment(min(length, max_length)) for length in _PACKED_LENGTHS]
    tokens = (torch.arange(sum(segment.length for segment in segments), device=device) * 7 + 3) % vocab_size
    ids = torch.cat([torch.arange(segment.length, device=device) for segment in segments])
    other = tokens.clone()
    other[: segments[0].length].add_(1).remainder_(vocab_size)
    try:
        packed, moved = (trunk.packed(None, row, ids, segments) for row in (tokens, other))
        parts = tokens.split_with_sizes([segment.length for segment in segments])
        alone = torch.cat([trunk.hidden(None, part[None], None)[0] for part in parts])
    except (TypeError, AttributeError, LookupError, ValueError, RuntimeError) as error:
        raise _packing_problem(name, trunk, f"it raises {type(error).__name__}") from error
    second = segments[0].length
    # Equal shapes take equal kernels: what is masked cannot change the last bit by much.
    if not typical_error(packed[second:], moved[second:]) <= tolerance(packed, dtype) / 100:
        raise _packing_problem(name, trunk, "a sequence sees the one before it")
    difference, limit = largest_error(packed, alone), tolerance(alone, dtype)
    if not difference <= limit:
        reason = f"a packed sequence and the sequence alone disagree by {_shown(difference)}, not {limit:.2g}"
        raise _packing_problem(name, trunk, reason)


def _packing_problem(name: str, trunk: Trunk, reason: str) -> CaseError:
    return CaseError(
        [f"model {name!r} cannot read packed rows ({trunk.name} trunk): {reason}; sft.packing must be false."]
    )


def _read(model: LoadedModel, hidden: torch.Tensor) -> torch.Tensor:
    return hidden if model.lm_head is None else wide_log_softmax(model.lm_head(hidden))


def _shown(error: float) -> str:
    return f"{error:.2g}" if math.isfinite(error) else "values that are not finite"


def decode(
    trunk: Trunk, tokens: torch.Tensor, attention_mask: torch.Tensor | None, *, num_decoded: int
) -> torch.Tensor:
    """Hidden states [b, 1 + num_decoded, d] of the bare base, the last ``num_decoded`` from decode steps.

    Args:
        trunk: the trunk.
        tokens: [b, t].
        attention_mask: [b, t], 0 on padding, or ``None``.
        num_decoded: tokens that are read one at a time, after a prefill of the others.
    """
    t = tokens.shape[1]
    decoder = trunk.decoder(None, t, Observer())
    states = []
    for start, end in [(0, t - num_decoded), *((at, at + 1) for at in range(t - num_decoded, t))]:
        mask = None if attention_mask is None else attention_mask[:, :end]
        states.append(decoder.advance(tokens[:, start:end], mask).clone())  # the next step may overwrite it
    return torch.stack(states, 1)
