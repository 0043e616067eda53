"""The number of positions whose logits are computed at a time."""

from __future__ import annotations

from rlhfkernels.config.case import Case
from rlhfkernels.config.options import CPU_LOGPROB_CHUNK

# Float32 logits of a chunk on an accelerator, and the largest chunk.
_LOGITS_BYTES, _MAX_LOGPROB_CHUNK = 2**28, 1024


def logprob_chunk_size(case: Case, vocab_size: int) -> int:
    """Returns ``engine.logprob_chunk_size`` of ``case``, or that of its device.

    128 positions bound the head's matmul on an H100 by memory: each chunk reads the whole head, and a position is worth
    128 multiply-adds for every weight read, where the H100 needs about 300. Not yet measured on a GPU.

    Args:
        case: the case; its device decides.
        vocab_size: columns of the logits.
    """
    asked = case.options.engine.logprob_chunk_size
    if asked is not None:
        return asked
    if case.device == "cpu":
        return CPU_LOGPROB_CHUNK
    return min(_MAX_LOGPROB_CHUNK, max(CPU_LOGPROB_CHUNK, _LOGITS_BYTES // (4 * vocab_size)))
