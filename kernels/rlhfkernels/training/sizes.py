"""The sizes of a step's models and optimizers: what its work and ZeRO's buffers depend on."""

from __future__ import annotations

import dataclasses
import sys
from typing import TYPE_CHECKING, Any, Self

from torch import nn
from transformers.pytorch_utils import Conv1D

from rlhfkernels.engine.engine import Engine
from rlhfkernels.parallel.strategies import whole_numel

if TYPE_CHECKING:
    from rlhfkernels.training.step import TrainingStep


@dataclasses.dataclass(frozen=True, slots=True)
class Weights:
    """A number of weights, and their bytes."""

    count: int
    num_bytes: int


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class BaseSizes:
    """Sizes of one base.

    Attributes:
        windows: for each layer, the positions that a query sees, itself included; ``None`` is all before it.
        hidden: width.
        matmul: elements of the weights of the trunk's linear layers, adapters excluded.
        matmul_item: bytes of one of them.
        head: elements of the language-model head.
        query_channels: attention channels of a layer's queries.
        kv_channels: attention channels of a layer's keys.
        adapters: weights of each adapter set.
    """

    windows: tuple[int | None, ...]
    hidden: int
    matmul: int
    matmul_item: int
    head: int
    query_channels: int
    kv_channels: int
    adapters: dict[str, Weights]

    @property
    def num_layers(self) -> int:
        """Number of layers."""
        return len(self.windows)

    @property
    def matmul_bytes(self) -> int:
        """Bytes of the trunk's linear layers."""
        return self.matmul * self.matmul_item

    @property
    def head_bytes(self) -> int:
        """Bytes of the language-model head."""
        return self.head * self.matmul_item

    @property
    def unread(self) -> int:
        """Weights of the last layer without its key and value projections: unused where the output is unread."""
        return self.matmul // self.num_layers - 2 * self.hidden * self.kv_channels

    @property
    def first_inputs(self) -> int:
        """Weights of the first layer's query, key and value projections, whose inputs are the embeddings."""
        return self.hidden * (self.query_channels + 2 * self.kv_channels)

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


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class StepSizes:
    """Sizes of a step.

    Attributes:
        bases: of each base.
        trained: weights that are trained, of all ranks.
        trained_item: bytes of the widest trained weight; 0 if nothing is trained.
        updated: the part of them that this rank's optimizers update.
        updated_read_bytes: bytes of those of them that an update reads: the others have a master copy.
        optimizer_bytes: what these optimizers hold once they have stepped.
    """

    bases: dict[str, BaseSizes]
    trained: Weights
    trained_item: int
    updated: Weights
    updated_read_bytes: int
    optimizer_bytes: int

    @classmethod
    def of(cls, step: TrainingStep) -> Self:
        """Returns the sizes of ``step``."""
        trained = step.trained_parameters()
        shares = [optimizer.share() for optimizer in step.optimizers.values()]
        released = step.released_sizes
        return cls(
            bases={base: released.get(base) or base_sizes(step.engine, base) for base in step.method.bases},
            trained=_weights(trained),
            trained_item=max((p.element_size() for p in trained), default=0),
            updated=Weights(sum(share.count for share in shares), sum(share.num_bytes for share in shares)),
            updated_read_bytes=sum(share.read_bytes for share in shares),
            optimizer_bytes=sum(share.held_bytes for share in shares),
        )

    def deepened(self, deeper: StepSizes, times: int) -> StepSizes:
        """Returns the sizes ``times`` periods of layers beyond ``deeper``, which is two periods deeper than this."""
        sizes: StepSizes = _deepened(self, deeper, times)
        return sizes


def _deepened(shallow: Any, deeper: Any, times: int) -> Any:
    if isinstance(shallow, int):
        return deeper + (deeper - shallow) * times // 2
    if isinstance(shallow, tuple):  # an item a layer
        period = (len(deeper) - len(shallow)) // 2
        items = list(deeper)
        for _ in range(period * times):
            items.append(items[-period])
        return tuple(items)
    if isinstance(shallow, dict):
        return {key: _deepened(shallow[key], deeper[key], times) for key in shallow}
    fields = [field.name for field in dataclasses.fields(shallow)]
    return type(shallow)(**{name: _deepened(getattr(shallow, name), getattr(deeper, name), times) for name in fields})


def _weights(parameters: list[nn.Parameter]) -> Weights:
    counts = [whole_numel(p) for p in parameters]
    return Weights(sum(counts), sum(n * p.element_size() for n, p in zip(counts, parameters, strict=True)))


def base_sizes(engine: Engine, base: str) -> BaseSizes:
    """Returns the sizes of a base, whole where ranks divide its weights."""
    model, adapters = engine.models[base], engine.adapters[base]
    config = model.trunk.config
    linear = [m for m in model.trunk.modules() if isinstance(m, (nn.Linear, Conv1D))]
    added = {id(p) for p in adapters.parameters()}
    weights = [m.weight for m in linear if id(m.weight) not in added]
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or _kv_heads(model.trunk) or heads
    return BaseSizes(
        windows=_windows(model.trunk),
        hidden=model.hidden_size,
        matmul=sum(whole_numel(w) for w in weights),
        matmul_item=weights[0].element_size(),
        head=model.vocab_size * model.hidden_size,
        query_channels=heads * head_dim,
        kv_channels=kv_heads * head_dim,
        adapters={name: _weights(adapters.parameters(name)) for name in adapters.names},
    )


def _kv_heads(trunk: nn.Module) -> int | None:
    """Key-value heads as an attention module states them, where the configuration lacks the usual field; else ``None``.

    Falcon's follow from three fields, and the one with their number is not read where all queries share one head.
    """
    stated = (getattr(module, "num_kv_heads", None) for module in trunk.modules())
    return next((count for count in stated if isinstance(count, int)), None)


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
