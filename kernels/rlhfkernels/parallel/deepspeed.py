"""DeepSpeed's ZeRO: an engine for each trained role in stages 0 to 2, an engine for each base in stage 3.

Stages 0 to 2 keep all weights on every rank, and DeepSpeed needs the trained ones alone: an engine for each role gives
the role a learning rate and a gradient norm of its own. Stage 3 divides every weight of a base, so that a base has one
engine, with a parameter group for each role.
"""

from __future__ import annotations

import functools
import importlib
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn
from torch.torch_version import TorchVersion

from rlhfkernels.config.options import OPTION_PACKAGES, Options
from rlhfkernels.errors import CaseError
from rlhfkernels.parallel.strategies import (
    BaseModule,
    RoleOptimizer,
    Schedule,
    Strategy,
    TrainedWeights,
    by_storage,
)
from rlhfkernels.parallel.world import World
from rlhfkernels.parallel.zero_optimizers import (
    DividedBase,
    DividedOptimizer,
    ReplicatedOptimizer,
    ZeroOptimizer,
    make_optimizer,
    part_of,
)

T = TypeVar("T")
# The first whose steps end where the caller says (``managed_gradient_accumulation``).
_OLDEST = "0.19.0"
# Stands for a rollout among the modules that use a weight: a layer's hooks would let go of the weight after a token.
_ROLLOUT = -1
# Weights are gathered for a forward and for a backward, and freed after each. By default DeepSpeed prefetches 50
# million elements, and keeps 1,000 million, where the order of modules is that of the pass before. The passes of a step
# differ, so that what is held would depend on the passes before.
_GATHERING = {
    "stage3_prefetch_bucket_size": 0,
    "stage3_max_reuse_distance": 0,
    "stage3_param_persistence_threshold": 0,
}


class _DeepSpeed(Strategy):
    """Every rank holds all weights; the optimizer states are divided in stage 1, the gradients too in stage 2.

    Args:
        options: of the case.
        world: the ranks.
        device: of this rank.
        may_skip: see ``Strategy``.

    Raises:
        CaseError: DeepSpeed is not installed.
    """

    def __init__(self, options: Options, world: World, device: torch.device, *, may_skip: bool = False) -> None:
        super().__init__(options, world, device, may_skip=may_skip)
        self._package = load(device)

    def declare_trained(self, roles: Mapping[str, Sequence[nn.Parameter]], passes: Mapping[str, Sequence[str]]) -> None:
        """See ``Strategy.declare_trained``."""
        flattened = {role: by_storage(parameters) for role, parameters in roles.items() if parameters}
        self._engines = {
            role: self._make_engine(TrainedWeights(parameters), [parameters]) for role, parameters in flattened.items()
        }
        self._roles_of_pass = {key: [role for role in found if role in self._engines] for key, found in passes.items()}
        for engine in self._engines.values():
            self._name_buckets(engine.optimizer)

    def _name_buckets(self, optimizer: Any) -> None:
        """Has the observer told of an engine's bucket, which is made anew in every backward."""
        make = optimizer.setup_buckets

        def make_and_tell() -> None:
            make()
            self.observer.tag("buckets", [each for bucket in optimizer.ipg_buckets.values() for each in bucket.buffer])

        optimizer.setup_buckets = make_and_tell

    def train(self, key: str, base: str, function: Callable[[], torch.Tensor], *, is_last: bool) -> torch.Tensor:
        """See ``Strategy.train``. The backward of a pass that trains weights of two roles goes through both engines."""
        for role in self._roles_of_pass[key]:
            function = functools.partial(self._engines[role], function)
        return function()

    def optimizer(self, role: str, schedule: Schedule) -> RoleOptimizer:
        """See ``Strategy.optimizer``."""
        return ZeroOptimizer(self._engines[role], schedule)

    def _make_engine(self, module: nn.Module, groups: Sequence[Sequence[nn.Parameter]]) -> Any:
        """DeepSpeed's engine of a module, with an optimizer of one parameter group for each of ``groups``."""
        dtype = next(module.parameters()).dtype
        optimizer = make_optimizer(self.options.optimizer, groups) if groups else None
        engine, *_ = self._package.initialize(
            model=module, optimizer=optimizer, config=self._config(dtype), dist_init_required=False
        )
        if optimizer is not None:
            # In stage 0 with bfloat16 DeepSpeed makes the states in a step of zero gradients
            # (fp16/unfused_optimizer.py, initialize_optimizer_states), which AdamW's bias correction must not count.
            for state in optimizer.state.values():
                if "step" in state:
                    state["step"].zero_()
        return engine

    def _config(self, dtype: torch.dtype) -> dict[str, Any]:
        parallel, stage = self.options.parallel, self.options.parallel.zero_stage
        return {
            "train_micro_batch_size_per_gpu": 1,  # it counts samples alone
            "zero_optimization": {
                "stage": stage,
                "reduce_bucket_size": parallel.reduce_bucket_size,
                **(_GATHERING if stage == 3 else {}),
            },
            "zero_allow_untested_optimizer": True,
            "bf16": {"enabled": dtype == torch.bfloat16},
            "gradient_clipping": self.options.optimizer.max_grad_norm if stage < 3 else 0.0,
            # A step has as many backwards as the method needs.
            "managed_gradient_accumulation": stage == 0,
        }


class _Stage0(_DeepSpeed):
    """Stage 0: nothing is divided; gradients are averaged in one all-reduce, before the optimizer's step."""

    def train(self, key: str, base: str, function: Callable[[], torch.Tensor], *, is_last: bool) -> torch.Tensor:
        """See ``Strategy.train``. The engine does not see the pass: in stage 0 it would have to run the backward."""
        return function()

    def optimizer(self, role: str, schedule: Schedule) -> RoleOptimizer:
        """See ``Strategy.optimizer``."""
        return ReplicatedOptimizer(self._engines[role], schedule)

    def _name_buckets(self, optimizer: Any) -> None:
        """Does nothing: a stage that reduces whole gradients has no bucket."""


class _Stage3(_DeepSpeed):
    """Stage 3: weights are divided too, those of frozen bases as well; a rank gathers those of a module to run it."""

    def divide(self, bases: Mapping[str, BaseModule]) -> None:
        """See ``Strategy.divide``; DeepSpeed divides weights and makes optimizers together, in ``declare_trained``."""
        self._bases = dict(bases)

    def declare_trained(self, roles: Mapping[str, Sequence[nn.Parameter]], passes: Mapping[str, Sequence[str]]) -> None:
        """See ``Strategy.declare_trained``."""
        self._divided: dict[str, DividedBase] = {}
        for base, module in self._bases.items():
            held = {id(p) for p in module.parameters()}
            found = {role: list(ps) for role, ps in roles.items() if ps and id(ps[0]) in held}
            self._gather_by_layer(module)
            self._divided[base] = DividedBase(self._make_engine(module, list(found.values())), found)

    def _gather_by_layer(self, module: BaseModule) -> None:
        """Gathers the weights of a layer with the layer, and all others with the base.

        DeepSpeed gathers what a module owns itself. Heads, norms and a fast trunk's matmuls are read by their weights,
        and no module of theirs is called.
        """
        layers = module.layers()
        in_layers = {id(parameter) for layer in layers for parameter in layer.parameters()}
        others = [parameter for parameter in module.parameters() if id(parameter) not in in_layers]
        owned = [(layer, parameter) for layer in layers for parameter in layer.parameters()]
        for owner, parameter in [*owned, *((module, parameter) for parameter in others)]:
            self._package.zero.register_external_parameter(owner, parameter)

    def read(self, base: str, function: Callable[[], T]) -> T:
        """See ``Strategy.read``."""
        found: list[T] = []
        self._divided[base].engine.module(
            lambda: found.append(function())
        )  # DeepSpeed looks for tensors in what it returns
        return found[0]

    def generate(self, base: str, function: Callable[[], T]) -> T:
        """See ``Strategy.generate``."""
        if self.options.parallel.gather == "layer":
            return self.read(base, function)
        module = self._bases[base]
        for parameter in module.parameters():
            _users(parameter).add(_ROLLOUT)
        try:
            return self.read(base, function)
        finally:
            for parameter in module.parameters():
                _users(parameter).discard(_ROLLOUT)
            for each in (*module.layers(), module):
                self._divided[base].coordinator.release_sub_module(each, forward=True)

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """See ``Strategy.tensors``: the partitions, and the buffers that DeepSpeed keeps between steps."""
        for module in self._bases.values():
            yield from (("base", part_of(parameter)) for parameter in module.parameters())
        for base in self._divided.values():
            if base.roles:
                zero = base.engine.optimizer
                yield "gradients", zero.grad_partitions_flat_buffer
                for bucket in zero.ipg_buckets.values():
                    yield "buckets", bucket.buffer

    @contextmanager
    def whole(self) -> Iterator[None]:
        """See ``Strategy.whole``."""
        with self._package.zero.GatheredParameters([p for module in self._bases.values() for p in module.parameters()]):
            yield

    def release(self, base: str) -> None:
        """See ``Strategy.release``."""
        del self._bases[base]
        self._divided.pop(base).engine.destroy()

    def train(self, key: str, base: str, function: Callable[[], torch.Tensor], *, is_last: bool) -> torch.Tensor:
        """See ``Strategy.train``."""
        return self._divided[base].engine(function)  # type: ignore[no-any-return]

    def optimizer(self, role: str, schedule: Schedule) -> RoleOptimizer:
        """See ``Strategy.optimizer``."""
        base = next(base for base in self._divided.values() if role in base.roles)
        return DividedOptimizer(
            base,
            list(base.roles).index(role),
            base.roles[role],
            schedule,
            world=self.world,
            max_grad_norm=self.options.optimizer.max_grad_norm,
        )

    def all_ended(self, ended: bool) -> bool:
        """See ``Strategy.all_ended``: every layer is gathered by all ranks together."""
        return self.world.all_true(ended, self.device)


def _users(parameter: nn.Parameter) -> set[int]:
    """The modules that use a gathered weight, by DeepSpeed's number: it is let go when there is none."""
    users: set[int] = parameter.ds_active_sub_modules  # type: ignore[attr-defined]
    return users


# By ``parallel.zero_stage``.
_STAGES: dict[int, type[_DeepSpeed]] = {0: _Stage0, 1: _DeepSpeed, 2: _DeepSpeed, 3: _Stage3}


def make_deepspeed(options: Options, world: World, device: torch.device, *, may_skip: bool = False) -> Strategy:
    """Makes DeepSpeed's strategy of the case's ``parallel.zero_stage``; arguments as ``Strategy``.

    Raises:
        CaseError: DeepSpeed is not installed.
    """
    return _STAGES[options.parallel.zero_stage](options, world, device, may_skip=may_skip)


def load(device: torch.device) -> Any:
    """DeepSpeed, told of the device: it would look for one, and log that it found none.

    Raises:
        CaseError: it is not installed, or it is too old.
    """
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    # By this number engines choose their device. Those of stage 3 read it in every step, so it stays set.
    if device.index is None:
        os.environ.setdefault("LOCAL_RANK", "0")
    else:
        os.environ["LOCAL_RANK"] = str(device.index)
    name = OPTION_PACKAGES["parallel.strategy"]["deepspeed"]
    try:
        package = importlib.import_module(name)
    except ImportError as error:
        raise CaseError([f"parallel.strategy is 'deepspeed': it needs {name}, which is not installed."]) from error
    if TorchVersion(package.__version__) < _OLDEST:
        problem = f"parallel.strategy is 'deepspeed': it needs {name} {_OLDEST} or later, and {package.__version__} is"
        raise CaseError([f"{problem} installed."])
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # Without this, a run on CPUs would begin with the compilation of an all-reduce over shared memory.
    package.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # They come from backwards too, which run in threads of their own.
    warnings.filterwarnings("ignore", "`torch.distributed.all_gather_into_tensor` is deprecated", FutureWarning)
    warnings.filterwarnings("ignore", "`torch.distributed.reduce_scatter_tensor` is deprecated", FutureWarning)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.jit.script", DeprecationWarning)
        # It imports torch's compiler, which takes 2 s: the first backward would import it.
        importlib.import_module(f"{name}.runtime.zero.muon.muon_optimizer")
    return package
