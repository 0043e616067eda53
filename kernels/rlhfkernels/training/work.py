"""The least work of a step, phase by phase: the operations its method asks for, and the bytes it cannot avoid moving.

Counted are products with weights, attention (causal: half of the square), the head at completion positions only, and
each weight, cached key and value once per forward that needs it. Of the last layer, positions that no head reads need
their keys and values only. Not counted is what a better kernel could avoid: activations that travel through memory,
norms, padding, recomputation.
"""

from __future__ import annotations

import dataclasses

from torch import nn
from transformers.pytorch_utils import Conv1D

from rlhfkernels.engine.engine import Engine
from rlhfkernels.methods.table import Pass, Role, RoleName, update_phase
from rlhfkernels.training.step import PPOStep

# Operations of AdamW for one weight: two moments, their corrections, the root, the division, the decay, the update.
_ADAMW_FLOPS = 15


@dataclasses.dataclass(frozen=True, slots=True)
class Work:
    """What a phase must do at least.

    Attributes:
        flops: floating-point operations; a multiplication and an addition are two.
        bytes: read from and written to the device's memory.
    """

    flops: int
    bytes: int

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.bytes + other.bytes)

    def floor_s(self, flops_per_s: float, bytes_per_s: float) -> float:
        """The shortest time in seconds on a device with these two ceilings."""
        return max(self.flops / flops_per_s, self.bytes / bytes_per_s)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Shape:
    """The sizes of one base that work depends on: numbers of weights, and of attention channels over all layers."""

    num_layers: int
    hidden: int
    trunk: int
    trunk_item: int
    head: int
    query_channels: int
    kv_channels: int

    @property
    def trunk_bytes(self) -> int:
        return self.trunk * self.trunk_item

    @property
    def head_bytes(self) -> int:
        return self.head * self.trunk_item

    @property
    def unread(self) -> int:
        """Weights of the last layer that a position needs only where its output is read: all but keys' and values'."""
        return (self.trunk - 2 * self.hidden * self.kv_channels) // self.num_layers


def phase_work(step: PPOStep) -> dict[str, Work]:
    """The least work of every phase of ``step``, by the phase's name."""
    counter = _Counter(step.engine)
    case = step.case
    rounds = case.options.ppo.num_ppo_epochs
    work = {"generate": counter.generate(), "score": counter.score()}
    for p in step.engine.method.update_passes:
        name = update_phase(p)
        passes = rounds * (case.batch_size // case.micro_batch_size)
        one = counter.differentiate(p)
        work[name] = Work(one.flops * rounds, one.bytes * passes)
    one = counter.optimize(step)
    times = rounds * case.options.ppo.num_mini_batches
    work["optimize"] = Work(one.flops * times, one.bytes * times)
    return work


class _Counter:
    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._case = engine.case
        self._shapes = {base: _shape_of(engine, base) for base in engine.method.bases}
        self._num_tokens = self._case.batch_size * self._case.seq_len
        self._num_completion_tokens = self._case.batch_size * self._case.completion_len

    def _adapter(self, base: str, adapter: str | None) -> tuple[int, int]:
        """Weights and bytes of an adapter set."""
        parameters = [] if adapter is None else self._engine.adapters[base].parameters(adapter)
        return sum(p.numel() for p in parameters), sum(p.nbytes for p in parameters)

    def _unread_flops(self, base: str, adapter: int, base_products: int = 1, adapter_products: int = 1) -> int:
        """What the last layer needs not do for the prompt, but for its last position, whose output is the first read.

        Of an adapter set all of its last layer's share is taken, which is a little too much where it is on keys and
        values too: the least work is rather too low than too high.
        """
        shape, unread = self._shapes[base], self._case.prompt_len - 1
        weights = base_products * shape.unread + adapter_products * adapter // shape.num_layers
        attention = 2 * adapter_products * shape.query_channels // shape.num_layers * unread
        return (2 * weights + attention) * unread * self._case.batch_size

    def _attention_flops(self, base: str, length: int) -> int:
        """Both attention products of one causal forward over the batch: q kᵀ and p v, half of the square each."""
        return 2 * self._shapes[base].query_channels * length * length * self._case.batch_size

    def _head_flops(self, role: Role) -> int:
        """The head's product at the positions that ``role`` reads."""
        if role.head == "lm":
            return 2 * self._shapes[role.base].head * self._num_completion_tokens
        return 2 * self._engine.models[role.base].hidden_size * self._num_completion_tokens

    def _head_bytes(self, role: Role) -> int:
        return self._shapes[role.base].head_bytes if role.head == "lm" else 0

    def generate(self) -> Work:
        """The prompt once, then one forward a token; every forward reads the weights, and the cache so far."""
        case, role = self._case, self._engine.method.roles["actor"]
        shape = self._shapes[role.base]
        adapter, adapter_bytes = self._adapter(role.base, role.adapter)
        seen = case.seq_len - 1
        flops = 2 * (shape.trunk + adapter) * case.batch_size * seen
        flops += self._attention_flops(role.base, seen) + self._head_flops(role)
        flops -= self._unread_flops(role.base, adapter)
        weights = (shape.trunk_bytes + adapter_bytes + shape.head_bytes) * case.completion_len
        cached_reads = sum(range(case.prompt_len, seen))
        kv_item = 2 * shape.kv_channels * shape.trunk_item * case.batch_size
        return Work(flops, weights + kv_item * (cached_reads + seen))

    def score(self) -> Work:
        """Every pass forward once; a base that several passes read is read once."""
        method = self._engine.method
        flops = moved = 0
        for base in dict.fromkeys(p.base for p in method.score_passes):
            moved += self._shapes[base].trunk_bytes
        for p in method.score_passes:
            adapter, adapter_bytes = self._adapter(p.base, p.adapter)
            flops += 2 * (self._shapes[p.base].trunk + adapter) * self._num_tokens
            flops += self._attention_flops(p.base, self._case.seq_len) - self._unread_flops(p.base, adapter)
            moved += adapter_bytes
            for role in (method.roles[name] for name in p.roles):
                flops += self._head_flops(role)
                moved += self._head_bytes(role)
        return Work(flops, moved)

    def differentiate(self, p: Pass) -> Work:
        """Forward and backward: a weight's product again for its input, and again for itself where it is trained."""
        shape = self._shapes[p.base]
        roles = {name: self._engine.method.roles[name] for name in p.roles}
        adapter, adapter_bytes = self._adapter(p.base, p.adapter)
        base_products = 3 if any("base" in role.trains for role in roles.values()) else 2
        flops = 2 * (base_products * shape.trunk + 3 * adapter) * self._num_tokens
        flops += 3 * self._attention_flops(p.base, self._case.seq_len)
        flops -= self._unread_flops(p.base, adapter, base_products, 3)
        moved = base_products * shape.trunk_bytes + 3 * adapter_bytes
        for name, role in roles.items():
            head_products = 3 if _trains_head(self._engine, name) else 2
            flops += head_products * self._head_flops(role)
            moved += head_products * self._head_bytes(role)
        return Work(flops, moved)

    def optimize(self, step: PPOStep) -> Work:
        """Every trained weight, its gradient and the optimizer's tensors: read, and all but the gradient written."""
        trained = step.trained_parameters()
        held = sum(t.nbytes for optimizer in step.optimizers.values() for t in optimizer.tensors())
        weights = sum(p.nbytes for p in trained)
        return Work(_ADAMW_FLOPS * sum(p.numel() for p in trained), 3 * weights + 2 * held)


def _trains_head(engine: Engine, name: RoleName) -> bool:
    return "head" in engine.method.roles[name].trains


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
        num_layers=config.num_hidden_layers,
        hidden=model.hidden_size,
        trunk=sum(w.numel() for w in weights),
        trunk_item=weights[0].element_size(),
        head=model.vocab_size * model.hidden_size,
        query_channels=config.num_hidden_layers * heads * head_dim,
        kv_channels=config.num_hidden_layers * kv_heads * head_dim,
    )
