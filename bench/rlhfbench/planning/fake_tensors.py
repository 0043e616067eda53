"""Fake tensors for recordings: torch's own, with a cache of what each op returns.

A recording has some ten thousand ops. Nine in ten have arguments of shapes that another layer, pass, depth or method
had before, so their outputs are made from a recipe, in place of finding out once more what they are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

_UNCACHED_TAGS = frozenset({torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape, torch.Tag.inplace_view})
_DEVICE = torch.ops.prim.device.default
# The matmul of a mixture of experts. Fake tensors know it in bfloat16 alone, CPUs in float32 too.
_GROUPED_MATMUL = torch.ops.aten._grouped_mm.default
# A plan of Llama-7B adds a thousand, a batch of another size as many. 30,000 take some 50 MB.
_MAX_RECIPES = 30_000


class _UncacheableError(Exception):
    """An argument or an output that no key or recipe describes."""


@dataclasses.dataclass(frozen=True, slots=True)
class _New:
    """An output with a storage of its own."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


@dataclasses.dataclass(frozen=True, slots=True)
class _View:
    """An output on the storage of the tensor argument with index ``of``."""

    of: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype


@dataclasses.dataclass(frozen=True, slots=True)
class _Argument:
    """An output that is the tensor argument with this index."""

    index: int


_Output = _New | _View | _Argument | None


@dataclasses.dataclass(frozen=True, slots=True)
class _Recipe:
    """The outputs of an op; ``kind`` is the sequence that holds them, and ``None`` for a single one."""

    kind: type[list[Any]] | type[tuple[Any, ...]] | None
    outputs: tuple[_Output, ...]


# By op and description of its arguments; None where only torch can. All modes of a process share them.
_recipes: dict[Hashable, _Recipe | None] = {}
# Ops by their identity, as the hash of an op is a call of Python, and whether their outputs can be cached.
_ops: dict[int, tuple[Any, bool]] = {}


class CachingFakeTensorMode(FakeTensorMode):  # type: ignore[no-untyped-call]
    """A ``FakeTensorMode`` that asks torch once for what an op returns, and makes it from a recipe afterwards.

    Torch's own cache takes 50 to 70 us a hit, and 150 to 200 us for ops with several outputs or with ``out``, which it
    leaves out. A recipe takes 5 to 20 us, and 40 us for six outputs.
    """

    def __init__(self) -> None:
        super().__init__()
        self.cache_enabled = False  # torch's cache sees only what is asked for the first time
        self._attributes: dict[torch.device, dict[str, Any]] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Skips dynamo's check: it would import the compiler at the first op, and nothing is compiled here."""
        return False

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Returns the outputs of ``func``, as fake tensors of this mode."""
        if func is _DEVICE:
            return args[0].fake_device
        kwargs = kwargs or {}
        tensors: list[FakeTensor] = []
        try:
            key = self._key(func, args, kwargs, tensors)
        except _UncacheableError:
            return self._ask_torch(func, types, args, kwargs)
        if key not in _recipes:
            result = self._ask_torch(func, types, args, kwargs)
            keeps_arguments = key == self._key(func, args, kwargs, [])
            if len(_recipes) >= _MAX_RECIPES:
                _recipes.clear()
            _recipes[key] = self._recipe_of(result, tensors) if keeps_arguments else None
            return result
        recipe = _recipes[key]
        return self._ask_torch(func, types, args, kwargs) if recipe is None else self._make(recipe, tensors)

    def _ask_torch(self, func: Any, types: Sequence[type], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        if func is not _GROUPED_MATMUL or args[0].dtype == torch.bfloat16:
            return super().__torch_dispatch__(func, types, args, kwargs)
        with self:
            halves = [each.to(torch.bfloat16) for each in args[:2]]
            result = func(*halves, *args[2:], **kwargs)
            return torch.empty_strided(result.shape, result.stride(), dtype=args[0].dtype, device=result.device)

    def _key(
        self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], tensors: list[FakeTensor]
    ) -> tuple[Hashable, ...]:
        """Describes a call by all that its outputs depend on, and appends its tensors to ``tensors``."""
        identity = id(func)
        known = _ops.get(identity)
        if known is None:
            known = _ops[identity] = (func, _is_cacheable(func))
        if not known[1]:
            raise _UncacheableError
        parts: list[Any] = [identity, torch.get_default_dtype(), torch.is_inference_mode_enabled()]
        self._describe(args, parts, tensors)
        for name, value in kwargs.items():
            parts.append(name)
            self._describe((value,), parts, tensors)
        return tuple(parts)

    def _describe(self, values: Iterable[Any], parts: list[Any], tensors: list[FakeTensor]) -> None:
        for value in values:
            kind = type(value)
            if kind is FakeTensor:
                # A constant is a small tensor whose contents are known; torch computes with them.
                if value.constant is not None or value.layout is not torch.strided or value.fake_mode is not self:
                    raise _UncacheableError
                parts.append((value.shape, value.stride(), value.storage_offset(), value.dtype, value.fake_device))
                tensors.append(value)
            elif kind is list or kind is tuple:
                parts.append(len(value))
                self._describe(value, parts, tensors)
            elif isinstance(value, torch.Tensor):
                raise _UncacheableError
            else:
                parts.append(kind)  # 1, 1.0 and True are equal
                parts.append(value)

    def _recipe_of(self, result: Any, tensors: list[FakeTensor]) -> _Recipe | None:
        """Returns the recipe of ``result``; ``None`` if something else would be made from it."""
        kind = None if not isinstance(result, (list, tuple)) else list if isinstance(result, list) else tuple
        results = (result,) if kind is None else result
        try:
            outputs = tuple(_output_of(each, tensors) for each in results)
        except _UncacheableError:
            return None
        made_anew = [each for output, each in zip(outputs, results, strict=True) if isinstance(output, _New)]
        if len({each.untyped_storage()._cdata for each in made_anew}) != len(made_anew):
            return None  # outputs that share a storage
        recipe = _Recipe(kind, outputs)
        made = self._make(recipe, tensors)
        pairs = zip((made,) if kind is None else made, results, strict=True)
        return recipe if all(_are_alike(one, other) for one, other in pairs) else None

    def _make(self, recipe: _Recipe, tensors: list[FakeTensor]) -> Any:
        if recipe.kind is None:
            return self._make_one(recipe.outputs[0], tensors)
        return recipe.kind([self._make_one(output, tensors) for output in recipe.outputs])

    def _make_one(self, output: _Output, tensors: list[FakeTensor]) -> FakeTensor | None:
        if isinstance(output, _New):
            plain = torch.empty_strided(output.shape, output.stride, dtype=output.dtype, device="meta")
            return self._fake(plain, output.device)
        if isinstance(output, _View):
            origin = tensors[output.of]
            plain = torch.empty(0, dtype=output.dtype, device="meta")
            plain.set_(origin.untyped_storage(), output.offset, output.shape, output.stride)
            return self._fake(plain, origin.fake_device)
        return None if output is None else tensors[output.index]

    def _fake(self, plain: torch.Tensor, device: torch.device) -> FakeTensor:
        """Returns ``plain`` as a tensor of ``device``: what ``FakeTensor(self, plain, device)`` does, in a third."""
        attributes = self._attributes.get(device)
        if attributes is None:
            made = FakeTensor(self, plain, device)
            self._attributes[device] = dict(vars(made))
            return made
        made = torch.Tensor._make_subclass(
            FakeTensor, plain, False, dispatch_device=True, device_for_backend_keys=device
        )
        torch._C._set_throw_on_mutable_data_ptr(made)
        made.__dict__.update(attributes)
        return made


def _is_cacheable(func: Any) -> bool:
    return (
        isinstance(func, torch._ops.OpOverload)
        and func.namespace in ("aten", "prims")
        and _UNCACHED_TAGS.isdisjoint(func.tags)
    )


def _output_of(value: Any, tensors: list[FakeTensor]) -> _Output:
    if value is None:
        return None
    if type(value) is not FakeTensor or value.constant is not None or value.layout is not torch.strided:
        raise _UncacheableError
    for index, tensor in enumerate(tensors):
        if value is tensor:
            return _Argument(index)
    shape, stride = tuple(value.shape), value.stride()
    for index, tensor in enumerate(tensors):
        if value.untyped_storage()._cdata == tensor.untyped_storage()._cdata:
            return _View(index, shape, stride, int(value.storage_offset()), value.dtype)
    return _New(shape, stride, value.dtype, value.fake_device)


def _are_alike(made: FakeTensor | None, result: FakeTensor | None) -> bool:
    if made is None or result is None or made is result:
        return made is result
    return (
        _features(made) == _features(result)
        and vars(made).keys() == vars(result).keys()
        and torch._C._dispatch_key_set(made) == torch._C._dispatch_key_set(result)
    )


def _features(tensor: FakeTensor) -> tuple[Hashable, ...]:
    return (
        tensor.shape,
        tensor.stride(),
        tensor.storage_offset(),
        tensor.dtype,
        tensor.fake_device,
        tensor.untyped_storage().nbytes(),
        tensor.requires_grad,
        tensor.is_conj(),
        tensor.is_neg(),
    )
