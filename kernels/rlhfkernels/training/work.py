"""The roofline of a step: the FLOPs and bytes that each phase cannot avoid.

Counted are matmuls with weights, causal attention (half of the square, less what a sliding window hides), the head at
the positions that a stage reads, and every weight, cached key and cached value once for each forward that needs it.
Outputs of the last layer that no
head reads are not counted. Work that a better kernel could avoid is not counted either: activations that travel through
memory, norms, padding, recomputation.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from rlhfkernels.algorithms import OBJECTIVES
from rlhfkernels.engine.engine import Engine
from rlhfkernels.methods.program import (
    HEADS,
    Derive,
    ForwardPass,
    Generate,
    Optimize,
    Phase,
    Read,
    Role,
    Stage,
    Update,
    WeightSet,
)
from rlhfkernels.training.step import TrainingStep

# FLOPs of AdamW per weight: two moments, their corrections, the root, the division, the decay, the update.
_ADAMW_FLOPS = 15


@dataclasses.dataclass(frozen=True, slots=True)
class Work:
    """The least work of a phase.

    Attributes:
        flops: floating-point operations; a multiply-add is two.
        bytes: bytes read from and written to device memory.
        written_bytes: those of them that are written.
    """

    flops: int
    bytes: int
    written_bytes: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.bytes + other.bytes, self.written_bytes + other.written_bytes)

    def floor_s(self, flops_per_s: float, bytes_per_s: float, read_bytes_per_s: float | None = None) -> float:
        """The larger of compute time and memory time, in seconds.

        Args:
            flops_per_s: rate of matmuls.
            bytes_per_s: rate of a copy, both directions counted.
            read_bytes_per_s: rate of reading alone, for the bytes read beyond those written; that of a copy by default.
        """
        only_read = max(self.bytes - 2 * self.written_bytes, 0)
        memory_s = (self.bytes - only_read) / bytes_per_s + only_read / (read_bytes_per_s or bytes_per_s)
        return max(self.flops / flops_per_s, memory_s)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Shape:
    """Sizes of one base: elements of its weights, and attention channels of a layer.

    Attributes:
        windows: for each layer, the positions that a query sees, itself included; ``None`` is all before it.
    """

    windows: tuple[int | None, ...]
    hidden: int
    trunk: int
    trunk_item: int
    head: int
    query_channels: int
    kv_channels: int

    @property
    def num_layers(self) -> int:
        return len(self.windows)

    @property
    def trunk_bytes(self) -> int:
        return self.trunk * self.trunk_item

    @property
    def head_bytes(self) -> int:
        return self.head * self.trunk_item

    @property
    def unread(self) -> int:
        """Weights of the last layer without its key and value projections: unused where the output is unread."""
        return self.trunk // self.num_layers - 2 * self.hidden * self.kv_channels

    def attention_flops(self, length: int) -> int:
        """Both attention matmuls of one sequence, q kᵀ and p v: half of the square each, less what windows hide."""
        return sum(_attention_flops(self.query_channels, window, length) for window in self.windows)

    def last_attention_flops(self, length: int) -> int:
        """The share of the last layer in ``attention_flops``."""
        return _attention_flops(self.query_channels, self.windows[-1], length)

    def cached_positions(self, first: int, last: int) -> int:
        """Positions read from the caches of all layers by the steps after ``first`` to ``last − 1`` tokens."""
        limits = [last if window is None else window - 1 for window in self.windows]
        return sum(min(seen, limit) for limit in limits for seen in range(first, last))


def _attention_flops(channels: int, window: int | None, length: int) -> int:
    hidden = 0 if window is None else max(0, length - window)
    return 2 * channels * (length * length - hidden * hidden)


def phase_work(step: TrainingStep) -> dict[str, Work]:
    """The least work of every phase of ``step``, by the phase's name."""
    counter = _Counter(step)
    return {phase.name: _COUNTS[type(phase.stages[0])](counter, phase) for phase in step.phases}


class _Counter:
    def __init__(self, step: TrainingStep) -> None:
        self._step = step
        self._engine = step.engine
        self._method = step.method
        self._case = step.case
        self._shapes = {base: _shape_of(step.engine, base) for base in step.method.bases}
        self._num_sequences = step.case.batch_size * step.sequences_per_row

    def _adapter(self, weights: WeightSet) -> tuple[int, int]:
        """Weights and bytes of an adapter set."""
        adapters = self._engine.adapters[weights.base]
        parameters = [] if weights.adapter is None else adapters.parameters(weights.adapter)
        return sum(p.numel() for p in parameters), sum(p.nbytes for p in parameters)

    def _unread_flops(self, base: str, adapter: int, base_products: int = 1, adapter_products: int = 1) -> int:
        """Work of the last layer that nothing reads: that of the prompt, less its last position.

        Of an adapter set its share of one layer is taken, which is a little too much where it is on keys and values
        too: the least work errs on the low side.
        """
        shape, unread = self._shapes[base], self._case.prompt_len - 1
        weights = base_products * shape.unread + adapter_products * adapter // shape.num_layers
        attention = adapter_products * shape.last_attention_flops(unread)
        return (2 * weights * unread + attention) * self._num_sequences

    def _attention_flops(self, base: str, length: int) -> int:
        """Both attention matmuls of one causal forward over the batch."""
        return self._shapes[base].attention_flops(length) * self._num_sequences

    def _head_flops(self, role: Role, positions: int) -> int:
        """The head's matmul at ``positions`` of every sequence."""
        outputs = self._shapes[role.base].head
        if HEADS[role.head].outputs == "scalar":
            outputs = self._engine.models[role.base].hidden_size
        return 2 * outputs * positions * self._num_sequences

    def _head_bytes(self, role: Role) -> int:
        return self._shapes[role.base].head_bytes if HEADS[role.head].outputs == "vocabulary" else 0

    def generate(self, phase: Phase) -> Work:
        """The prompt once, then one forward a token; every forward reads the weights, and the cache so far."""
        case, stage = self._case, phase.stages[0]
        assert isinstance(stage, Generate)
        role = self._method.roles[stage.role]
        shape = self._shapes[role.base]
        adapter, adapter_bytes = self._adapter(role.weights)
        seen = case.seq_len - 1
        flops = 2 * (shape.trunk + adapter) * self._num_sequences * seen
        flops += self._attention_flops(role.base, seen) + self._head_flops(role, case.completion_len)
        flops -= self._unread_flops(role.base, adapter)
        weights = (shape.trunk_bytes + adapter_bytes + shape.head_bytes) * case.completion_len
        kv_item = 2 * shape.kv_channels * shape.trunk_item * self._num_sequences
        written = kv_item * seen * shape.num_layers
        read = kv_item * shape.cached_positions(case.prompt_len, seen)
        return Work(flops, weights + read + written, written)

    def score(self, phase: Phase) -> Work:
        """Every pass forward once; a base that several passes read is read once."""
        flops = 0
        moved = sum(self._shapes[base].trunk_bytes for base in dict.fromkeys(p.weights.base for p in phase.passes))
        for p in phase.passes:
            base = p.weights.base
            adapter, adapter_bytes = self._adapter(p.weights)
            flops += 2 * (self._shapes[base].trunk + adapter) * self._num_sequences * self._case.seq_len
            flops += self._attention_flops(base, self._case.seq_len) - self._unread_flops(base, adapter)
            moved += adapter_bytes
            for role in (self._method.roles[name] for name in p.roles):
                flops += self._head_flops(role, self._case.completion_len)
                moved += self._head_bytes(role)
        return Work(flops, moved)

    def update(self, phase: Phase) -> Work:
        """Every micro-batch of every epoch: a weight's bytes move once for each, its FLOPs are those of its rows."""
        case = self._case
        one = Work(0, 0)
        for p in phase.passes:
            one += self._differentiate(p)
        num_passes = case.num_epochs * (case.batch_size // case.micro_batch_size)
        return Work(one.flops * case.num_epochs, one.bytes * num_passes, one.written_bytes * num_passes)

    def _differentiate(self, p: ForwardPass) -> Work:
        """Forward and backward: a weight's matmul again for its input, and again for itself where it is trained."""
        shape, case = self._shapes[p.weights.base], self._case
        stages = [stage for stage in p.stages if isinstance(stage, Update)]
        reads_prompt = any(OBJECTIVES[stage.objective].reads_prompt(case.options) for stage in stages)
        roles = [self._method.roles[stage.role] for stage in stages]
        adapter, adapter_bytes = self._adapter(p.weights)
        base_products = 3 if any("base" in role.trains for role in roles) else 2
        flops = 2 * (base_products * shape.trunk + 3 * adapter) * self._num_sequences * case.seq_len
        flops += 3 * self._attention_flops(p.weights.base, case.seq_len)
        if not reads_prompt:
            flops -= self._unread_flops(p.weights.base, adapter, base_products, 3)
        moved = base_products * shape.trunk_bytes + 3 * adapter_bytes
        written = (base_products - 2) * shape.trunk_bytes + adapter_bytes  # the gradients
        positions = case.seq_len - 1 if reads_prompt else case.completion_len
        for role in roles:
            head_products = 3 if "head" in role.trains else 2
            flops += head_products * self._head_flops(role, positions)
            moved += head_products * self._head_bytes(role)
            written += (head_products - 2) * self._head_bytes(role)
        return Work(flops, moved, written)

    def optimize(self, phase: Phase) -> Work:
        """Every trained weight, its gradient and the optimizer's tensors: read, and all but the gradient written."""
        trained = self._step.trained_parameters()
        held = sum(t.nbytes for optimizer in self._step.optimizers.values() for t in optimizer.tensors())
        weights = sum(p.nbytes for p in trained)
        times = self._case.num_epochs * (self._case.batch_size // self._case.mini_batch_size)
        return Work(
            _ADAMW_FLOPS * sum(p.numel() for p in trained) * times,
            (3 * weights + 2 * held) * times,
            (weights + held) * times,
        )


_COUNTS: dict[type[Stage], Callable[[_Counter, Phase], Work]] = {
    Generate: _Counter.generate,
    Read: _Counter.score,
    Derive: _Counter.score,
    Update: _Counter.update,
    Optimize: _Counter.optimize,
}


def _shape_of(engine: Engine, base: str) -> _Shape:
    model = engine.models[base]
    config = model.trunk.config
    linear = [m for m in model.trunk.modules() if isinstance(m, (nn.Linear, Conv1D))]
    adapters = {id(p) for p in engine.adapters[base].parameters()}
    weights = [m.weight for m in linear if id(m.weight) not in adapters]
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    return _Shape(
        windows=_windows(model.trunk),
        hidden=model.hidden_size,
        trunk=sum(w.numel() for w in weights),
        trunk_item=weights[0].element_size(),
        head=model.vocab_size * model.hidden_size,
        query_channels=heads * head_dim,
        kv_channels=kv_heads * head_dim,
    )


def _windows(trunk: nn.Module) -> tuple[int | None, ...]:
    """The sliding window of each layer; ``None`` for layers without one.

    Some configurations have a window that their architecture does not read (Llama's may), so the architecture's module
    must use transformers' mask for it. A layer without a stated kind has the window (Mistral).
    """
    config: Any = trunk.config
    num_layers: int = config.num_hidden_layers
    window: int | None = getattr(config, "sliding_window", None)
    if not hasattr(sys.modules[type(trunk).__module__], "create_sliding_window_causal_mask"):
        window = None
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * num_layers
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)
