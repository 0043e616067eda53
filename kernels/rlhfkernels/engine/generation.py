"""Sampling of completions, one position at a time.

Shapes: n = sequences, p = prompt length, c = completion length, t = p + c.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from rlhfkernels.config.options import RolloutOptions
from rlhfkernels.data.batch import Batch
from rlhfkernels.engine.trunk import Decoder
from rlhfkernels.models.heads import LmHead
from rlhfkernels.ops.sample import sample


def sample_completions(
    batch: Batch,
    decoder: Decoder,
    head: LmHead,
    generator: torch.Generator | None,
    options: RolloutOptions,
    *,
    backend: str,
    skips_steps: bool,
    all_ended: Callable[[bool], bool],
) -> None:
    """Fills the completions of ``batch``, their mask and the column ``old_logprobs``.

    Args:
        batch: prompts, and room for completions.
        decoder: one that has read nothing.
        head: the language-model head that reads it.
        generator: the random state of sampling.
        options: temperature and stop token.
        backend: of the ops.
        skips_steps: leave out decode steps whose shapes lie between those of others: only shapes matter.
        all_ended: whether every rank that must go on together has ended, from whether this one has.
    """
    tokens = batch.tokens[:, : batch.prompt_len]
    n, p, c = batch.num_sequences, batch.prompt_len, batch.mask.shape[1]
    ended = torch.zeros(n, dtype=torch.bool, device=tokens.device) if options.stop_token_id is not None else None
    check_every = _tokens_between_looks(tokens.device)
    start = 0
    for t in range(p, p + c):
        # The prompt, the first step after it and the last step have the largest tensors.
        if skips_steps and p + 1 < t < p + c - 1 and decoder.can_skip:
            continue
        if t > max(p, start + 1):
            decoder.skip_to(t - 1)
            start = t - 1
        seen = None if batch.attention_mask is None else batch.attention_mask[:, :t]
        hidden = decoder.advance(batch.tokens[:, start:t], seen)
        logits = head.decode_logits(hidden, backend=backend)
        if options.temperature != 1.0:
            logits.div_(options.temperature)
        token, logprob = sample(logits, generator, backend=backend)
        if ended is not None:
            if t > p and (t - p) % check_every == 0 and all_ended(bool(ended.all())):
                batch.mask[:, t - p :] = 0
                break
            token, ended = _stop(batch, t, token, ended, options.stop_token_id)
        batch.tokens[:, t] = token
        batch["old_logprobs"][:, t - p] = logprob
        start = t


def _tokens_between_looks(device: torch.device) -> int:
    """Returns after how many tokens a generation looks whether all sequences have ended.

    A look waits for the device, which the CPU has done anyway. Steps that come too many compute masked tokens.
    """
    return 1 if device.type == "cpu" else 16


def _stop(
    batch: Batch, t: int, token: torch.Tensor, ended: torch.Tensor, stop_token: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Masks position ``t`` of the sequences that ended before it, whose token becomes 0."""
    batch.mask[:, t - batch.prompt_len] = (~ended).float()
    token = torch.where(ended, torch.zeros_like(token), token)
    return token, ended | (token == stop_token)
