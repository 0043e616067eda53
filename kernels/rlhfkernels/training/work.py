"""The roofline of a step: the FLOPs and bytes that each phase cannot avoid.

Counted are matmuls with weights, causal attention (half of the square, less what a sliding window hides), the head at
the positions that a stage reads, and every weight, cached key and cached value once for each forward that needs it.
Outputs of the last layer that no
head reads are not counted. Work that a better kernel could avoid is not counted either: activations that travel through
memory, norms, padding, recomputation.
"""

from __future__ import annotations

from collections.abc import Callable

from rlhfkernels.algorithms import OBJECTIVES
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
from rlhfkernels.training.roofline import Work
from rlhfkernels.training.sizes import StepSizes
from rlhfkernels.training.step import TrainingStep

# FLOPs of AdamW per weight: two moments, their corrections, the root, the division, the decay, the update.
_ADAMW_FLOPS = 15


def phase_work(step: TrainingStep, sizes: StepSizes | None = None) -> dict[str, Work]:
    """The least work of every phase of ``step``, by the phase's name.

    Args:
        step: the step.
        sizes: of the same step at another depth; ``None`` takes its own.
    """
    counter = _Counter(step, StepSizes.of(step) if sizes is None else sizes)
    return {phase.name: _COUNTS[type(phase.stages[0])](counter, phase) for phase in step.phases}


class _Counter:
    def __init__(self, step: TrainingStep, sizes: StepSizes) -> None:
        self._sizes = sizes
        self._method = step.method
        self._case = step.case
        self._shapes = sizes.bases
        self._num_sequences = step.case.batch_size * step.sequences_per_row

    def _adapter(self, weights: WeightSet) -> tuple[int, int]:
        """Weights and bytes of an adapter set."""
        if weights.adapter is None:
            return 0, 0
        adapter = self._shapes[weights.base].adapters[weights.adapter]
        return adapter.count, adapter.num_bytes

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
        shape = self._shapes[role.base]
        outputs = shape.hidden if HEADS[role.head].outputs == "scalar" else shape.head
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
        flops = 2 * (shape.matmul + adapter) * self._num_sequences * seen
        flops += self._attention_flops(role.base, seen) + self._head_flops(role, case.completion_len)
        flops -= self._unread_flops(role.base, adapter)
        weights = (shape.matmul_bytes + adapter_bytes + shape.head_bytes) * case.completion_len
        kv_item = 2 * shape.kv_channels * shape.matmul_item * self._num_sequences
        written = kv_item * seen * shape.num_layers
        read = kv_item * shape.cached_positions(case.prompt_len, seen)
        return Work(flops, weights + read + written, written)

    def score(self, phase: Phase) -> Work:
        """Every pass forward once; a base that several passes read is read once."""
        flops = 0
        moved = sum(self._shapes[base].matmul_bytes for base in dict.fromkeys(p.weights.base for p in phase.passes))
        for p in phase.passes:
            base = p.weights.base
            adapter, adapter_bytes = self._adapter(p.weights)
            flops += 2 * (self._shapes[base].matmul + adapter) * self._num_sequences * self._case.seq_len
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
        flops = 2 * (base_products * shape.matmul + 3 * adapter) * self._num_sequences * case.seq_len
        flops += 3 * self._attention_flops(p.weights.base, case.seq_len)
        if not reads_prompt:
            flops -= self._unread_flops(p.weights.base, adapter, base_products, 3)
        moved = base_products * shape.matmul_bytes + 3 * adapter_bytes
        written = (base_products - 2) * shape.matmul_bytes + adapter_bytes  # the gradients
        positions = case.seq_len - 1 if reads_prompt else case.completion_len
        for role in roles:
            head_products = 3 if "head" in role.trains else 2
            flops += head_products * self._head_flops(role, positions)
            moved += head_products * self._head_bytes(role)
            written += (head_products - 2) * self._head_bytes(role)
        return Work(flops, moved, written)

    def optimize(self, phase: Phase) -> Work:
        """Every trained weight, its gradient and the optimizer's tensors: read, and all but the gradient written."""
        trained, held = self._sizes.trained, self._sizes.optimizer_bytes
        weights = trained.num_bytes
        times = self._case.num_epochs * (self._case.batch_size // self._case.mini_batch_size)
        return Work(
            _ADAMW_FLOPS * trained.count * times,
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
