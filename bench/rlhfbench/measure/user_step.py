"""A user's own training step in place of a method's."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from rlhfbench.measure.live_tensors import TensorsSince
from rlhfkernels.config.case import Case
from rlhfkernels.errors import ModelError
from rlhfkernels.methods.phases import Phase
from rlhfkernels.observer import Observer


class UserStep:
    """Adapts an object with ``phases`` and ``run(observer)``; all else that a measurement reads is optional.

    Args:
        inner: The user's step. ``phases`` is a list of (name, ``inference`` or ``update``). ``run`` does one step
            inside ``with observer.phase(name)`` blocks; what is outside of them is not timed.
            ``persistent_tensors()`` yields (part, tensor) for what lives between steps. ``trained_parameters()``
            returns the parameters that get gradients.
        since: Was made before the step; knows its tensors.

    Raises:
        ModelError: It lacks phases or ``run``, or its phases break a rule.
    """

    trunk_used = attention_used = backend_used = "own"

    def __init__(self, inner: Any, since: TensorsSince) -> None:
        try:
            self.phases = tuple(Phase(name=name, kind=kind) for name, kind in inner.phases)
            self._run = inner.run
        except (AttributeError, TypeError, ValueError) as error:
            raise ModelError(
                f"step is {type(inner).__name__}: it must have phases, a list of (name, kind), and run(observer)."
            ) from error
        names = [phase.name for phase in self.phases]
        if not names or len(set(names)) < len(names) or not all(isinstance(name, str) for name in names):
            raise ModelError(f"the step's phases are {names}: there must be one or more, each with a name of its own.")
        wrong = [phase for phase in self.phases if phase.kind not in ("inference", "update")]
        if wrong:
            raise ModelError(f"phase {wrong[0].name} has the kind '{wrong[0].kind}': it must be inference or update.")
        self._inner, self._since = inner, since
        since.note()

    def run(self, observer: Observer) -> _NoStats:
        """Runs the user's step."""
        self._run(observer)
        return _NoStats()

    def persistent_tensors(self) -> Iterable[tuple[str, torch.Tensor]]:
        """Yields what the user declares, then gradients, then as temporary what else lives.

        Of a tensor, the first part counts. An op of the step need not use it: what each step keeps and never reads
        would stay unseen otherwise.
        """
        declared = getattr(self._inner, "persistent_tensors", None)
        if declared is not None:
            yield from declared()
        yield from (("gradients", p.grad) for p in self.trained_parameters() if p.grad is not None)
        for tensor in self._since.live():
            yield "temporary", tensor

    def trained_parameters(self) -> Sequence[torch.nn.Parameter]:
        """Returns what the user declares; nothing by default."""
        declared = getattr(self._inner, "trained_parameters", None)
        return [] if declared is None else list(declared())

    def rewind(self) -> None:
        """Does nothing: the user's step has data of its own."""

    def data_summary(self) -> dict[str, Any]:
        """Returns no summary."""
        return {}


class _NoStats:
    def check_finite(self) -> None:
        """Checks nothing."""

    def to_dict(self) -> dict[str, float | None]:
        """Returns nothing."""
        return {}


def load_step(name: str, case: Case) -> UserStep:
    """Calls ``module:function`` with a case and returns its step.

    Raises:
        ModelError: There is no such function, or it returns no step.
    """
    module, _, function = name.partition(":")
    since = TensorsSince()
    try:
        made = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ModelError(f"step is '{name}': it must be module:function, and {error}.") from error
    return UserStep(made(case), since)
