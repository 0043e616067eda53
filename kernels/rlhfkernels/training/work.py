"""The roofline of a step: the FLOPs and bytes that each phase cannot avoid.

Counted are matmuls with weights, causal attention (half of the square, less what a sliding window hides), the head at
the positions that a stage reads, and every weight, cached key and cached value once for each forward that needs it.
Positions behind the last one that a head reads, outputs of the last layer that no head reads, and the gradients of
frozen embeddings are not counted. Work that a better kernel could avoid is not counted either: activations that travel
through memory, norms, recomputation. Padding counts as tokens, except in packed rows, which have none: their lengths
are the data set's mean. The work is that of one rank.

A prompt counts once for each of its sequences. A little more than the least is counted of LoRA's first layer: the
gradients of the inputs of its adapters, of an MLP that runs beside the attention, and, where ``lora.target_modules``
leaves out query, key and value, of what lies before its first adapter. Of a mixture of experts the experts are missing.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

from rlhfkernels.config.case import Case
from rlhfkernels.methods.phases import ForwardPass, Phase
from rlhfkernels.methods.program import (
    HEADS,
    Derive,
    Generate,
    Optimize,
    Prepare,
    Read,
    Role,
    Stage,
    Update,
    WeightSet,
)
from rlhfkernels.training.gradients import PassForm
from rlhfkernels.training.quantities import QUANTITIES, predicting_positions
from rlhfkernels.training.roofline import Work
from rlhfkernels.training.sizes import StepSizes
from rlhfkernels.training.step import TrainingStep

# FLOPs per weight. AdamW: two moments, their corrections, the root, the division, the decay, the update. SGD: clipping,
# the decay, the update.
_OPTIMIZER_FLOPS = {"adamw": 15, "adamw8bit": 15, "sgd": 5}


def phase_work(step: TrainingStep, sizes: StepSizes | None = None, case: Case | None = None) -> dict[str, Work]:
    """The least work of every phase of ``step``, by the phase's name.

    Args:
        step: the step.
        sizes: of the same step at another depth; ``None`` takes its own.
        case: of which ``step`` is a plan, which leaves its stop token out; ``None`` takes the step's own.
    """
    counter = _Counter(step, StepSizes.of(step) if sizes is None else sizes, case or step.case)
    return {phase.name: _COUNTS[type(phase.stages[0])](counter, phase) for phase in step.phases}


class _Counter:
    def __init__(self, step: TrainingStep, sizes: StepSizes, case: Case) -> None:
        self._step = step
        self._sizes = sizes
        self._method = step.method
        self._case = case
        self._shapes = sizes.bases
        self._num_sequences = step.case.batch_size * step.sequences_per_row

    def _adapter(self, weights: WeightSet) -> tuple[int, int]:
        """Weights and bytes of an adapter set."""
        if weights.adapter is None:
            return 0, 0
        adapter = self._shapes[weights.base].adapters[weights.adapter]
        return adapter.count, adapter.num_bytes

    def _trunk_flops(self, weights: WeightSet, read: range, base_products: int = 1, adapter_products: int = 1) -> int:
        """One sequence up to the last position that a head reads.

        Of the last layer, positions before the first that a head reads need keys and values alone. Of an adapter set
        its share of one layer is taken for that, which is a little too much where it is on keys and values too: the
        least work errs on the low side.

        Args:
            weights: the weight set.
            read: the positions that a head reads.
            base_products: matmuls with a weight of the base.
            adapter_products: with a weight of the adapter set; attention's take part in as many.
        """
        shape, adapter = self._shapes[weights.base], self._adapter(weights)[0]
        products = base_products * shape.matmul + adapter_products * adapter
        unread = base_products * shape.unread + adapter_products * adapter // shape.num_layers
        attention = shape.attention_flops(read.stop) - shape.last_attention_flops(read.start)
        return 2 * (products * read.stop - unread * read.start) + adapter_products * attention

    def _head_flops(self, role: Role, positions: int) -> int:
        """The head's matmul at ``positions`` of a sequence."""
        shape = self._shapes[role.base]
        outputs = shape.hidden if HEADS[role.head].outputs == "scalar" else shape.head
        return 2 * outputs * positions

    def _head_bytes(self, role: Role) -> int:
        return self._shapes[role.base].head_bytes if HEADS[role.head].outputs == "vocabulary" else 0

    def generate(self, phase: Phase) -> Work:
        """The prompt once, then one forward a token; every forward reads the weights, and the cache so far.

        With a stop token only the first token is counted: generation may end after it.
        """
        case, stage = self._case, phase.stages[0]
        assert isinstance(stage, Generate)
        role = self._method.roles[stage.role]
        shape = self._shapes[role.base]
        num_tokens = case.completion_len if case.options.rollout.stop_token_id is None else 1
        sampled_at = predicting_positions(case.prompt_len, num_tokens)
        seen = sampled_at.stop
        flops = (self._trunk_flops(role.weights, sampled_at) + self._head_flops(role, num_tokens)) * self._num_sequences
        weights = (shape.matmul_bytes + self._adapter(role.weights)[1] + shape.head_bytes) * num_tokens
        kv_item = 2 * shape.kv_channels * shape.matmul_item * self._num_sequences
        written = kv_item * seen * shape.num_layers
        read = kv_item * shape.cached_positions(case.prompt_len, seen)
        return Work(flops, weights + read + written, written)

    def prepare(self, phase: Phase) -> Work:
        """The passes over every row of the data set; the weights are read again for each micro-batch."""
        num_rows, batch_size, micro = self._step.num_data_rows, self._case.batch_size, self._case.micro_batch_size
        one = self.score(phase)
        num_micro_batches = num_rows // batch_size * (batch_size // micro) + -(-(num_rows % batch_size) // micro)
        return Work(one.flops * num_rows // batch_size, one.bytes // (batch_size // micro) * num_micro_batches)

    def score(self, phase: Phase) -> Work:
        """Every pass forward, once for each micro-batch; a base that several passes read is read once for each."""
        flops = 0
        passes = self._step.passes_run(phase)
        moved = sum(self._shapes[base].matmul_bytes for base in dict.fromkeys(p.weights.base for p in passes))
        lengths = self._case.prompt_len, self._case.completion_len
        for p in passes:
            stages = [stage for stage in p.stages if isinstance(stage, Read)]
            read = [QUANTITIES[stage.quantity].positions(*lengths) for stage in stages]
            roles = [self._method.roles[stage.role] for stage in stages]
            flops += self._forward_flops(p.weights, roles, read) * self._num_sequences
            moved += self._adapter(p.weights)[1]
            moved += sum(self._head_bytes(self._method.roles[name]) for name in p.roles)
        return Work(flops, moved * (self._case.batch_size // self._case.micro_batch_size))

    def _forward_flops(self, weights: WeightSet, roles: list[Role], read: list[range]) -> int:
        """One sequence forward, without a graph; ``read`` are the positions that each of ``roles`` reads."""
        together = range(min(each.start for each in read), max(each.stop for each in read))
        heads = sum(self._head_flops(role, len(each)) for role, each in zip(roles, read, strict=True))
        return self._trunk_flops(weights, together) + heads

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
        form = PassForm(p, self._case.options)
        roles = [self._method.roles[stage.role] for stage in form.stages]
        lengths = {(self._case.prompt_len, self._case.completion_len): 1}
        if form.packs:
            lengths = dict(self._step.sequence_lengths())
        total = sum(self._graph_flops(p, roles, form.positions(*length)) * count for length, count in lengths.items())
        flops = int(Fraction(total, sum(lengths.values())) * self._num_sequences)
        shape, adapter_bytes = self._shapes[p.weights.base], self._adapter(p.weights)[1]
        moved = self._base_products(roles) * shape.matmul_bytes + 3 * adapter_bytes
        moved += sum(self._head_products(role) * self._head_bytes(role) for role in roles)
        written = (self._base_products(roles) - 2) * shape.matmul_bytes + adapter_bytes  # the gradients
        written += sum((self._head_products(role) - 2) * self._head_bytes(role) for role in roles)
        if form.in_two_passes:  # a graph for each sequence of a data row, and a forward of all before
            read = form.positions(self._case.prompt_len, self._case.completion_len)
            flops += self._forward_flops(p.weights, roles, [read] * len(roles)) * self._num_sequences
            moved, written = moved * self._step.sequences_per_row, written * self._step.sequences_per_row
            moved += shape.matmul_bytes + adapter_bytes + sum(map(self._head_bytes, roles))
        return Work(flops, moved, written)

    def _graph_flops(self, p: ForwardPass, roles: list[Role], read: range) -> int:
        """One sequence forward and backward; ``read`` are the positions that the heads read."""
        base_products = self._base_products(roles)
        flops = self._trunk_flops(p.weights, read, base_products, 3)
        if base_products == 2:  # frozen embeddings need no gradient
            flops -= 2 * self._shapes[p.weights.base].first_inputs * read.stop
        return flops + sum(self._head_products(role) * self._head_flops(role, len(read)) for role in roles)

    @staticmethod
    def _base_products(roles: list[Role]) -> int:
        """Matmuls with a trunk weight: forward, for the input's gradient, and for its own where it is trained."""
        return 3 if any("base" in role.trains for role in roles) else 2

    @staticmethod
    def _head_products(role: Role) -> int:
        """Matmuls with the head, likewise."""
        return 3 if "head" in role.trains else 2

    def optimize(self, phase: Phase) -> Work:
        """The rank's part of every trained weight, its gradient and the optimizer's tensors.

        All are read, except for weights with a master copy, and all but the gradient written.
        """
        updated, held = self._sizes.updated, self._sizes.optimizer_bytes
        weights, read = updated.num_bytes, self._sizes.updated_read_bytes
        times = self._case.num_epochs * (self._case.batch_size // self._case.mini_batch_size)
        return Work(
            _OPTIMIZER_FLOPS[self._case.options.optimizer.name] * updated.count * times,
            (read + 2 * weights + 2 * held) * times,
            (weights + held) * times,
        )


_COUNTS: dict[type[Stage], Callable[[_Counter, Phase], Work]] = {
    Generate: _Counter.generate,
    Read: _Counter.score,
    Prepare: _Counter.prepare,
    Derive: _Counter.score,
    Update: _Counter.update,
    Optimize: _Counter.optimize,
}
