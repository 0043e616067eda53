"""Plans of a case or of a sweep: memory predicted by a step on fake tensors, with no device and no weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from rlhfbench.cases import preflight
from rlhfbench.cases.sweep import Sweep
from rlhfbench.planning.devices import find_accelerator
from rlhfbench.planning.max_batch import Planned, plan_kinds
from rlhfkernels.config.case import Case


def plan(
    cases: Case | Iterable[Case] | Sweep,
    *,
    gpu: str | None = None,
    zero_stage: int = 0,
    world_size: int = 1,
    global_batch: bool = False,
    with_timeline: bool = False,
    meanwhile: Callable[[], object] = lambda: None,
) -> list[Planned]:
    """Predicts the memory of one training step of each case.

    Args:
        cases: a case, several cases, or a sweep.
        gpu: an accelerator such as ``a100-80gb``, or a size such as ``24GiB``. With it the largest batch that fits is
            found too, for every case, up to 512 data rows.
        zero_stage: stage of DeepSpeed's ZeRO, 0 to 3.
        world_size: number of ranks. With 1 and stage 0, each case is divided as its own options say.
        global_batch: batch sizes are over all ranks, and not of one rank.
        with_timeline: keep the bytes over time of each step.
        meanwhile: called after the checks, while other processes import what they plan with; not called where this
            process plans alone.

    Returns:
        One plan per case, in their order, of one rank. ``plan.memory`` is the ``memory`` object of a record, in bytes.

    Raises:
        SweepError: a model, a length, the accelerator or the division among ranks is wrong; every problem is named.
        CaseError: an option does not fit the model.

    Example:
        >>> case = Case(method="dpo-lora", model="tiny", prompt_len=8, completion_len=8, batch_size=2)
        >>> (planned,) = plan(case)
        >>> memory = planned.plan.memory
        >>> memory["peak_phase"], memory["total_bytes"] > 0
        ('update', True)
    """
    from rlhfbench.planning.zero import Zero, cases_of_a_rank

    accelerator = None if gpu is None else find_accelerator(gpu)
    zero = Zero(stage=zero_stage, world_size=world_size)
    is_given = zero != Zero()
    if not isinstance(cases, Sweep):
        cases = Sweep(cases=(cases,) if isinstance(cases, Case) else tuple(cases))
    sweep = cases
    preflight.check_models(sweep)
    of_ranks = sweep.cases
    if global_batch:
        of_ranks = cases_of_a_rank(sweep.cases, world_size if is_given else None)
    return plan_kinds(
        of_ranks,
        zero if is_given else None,
        usable_bytes=None if accelerator is None else accelerator.usable_bytes,
        with_timeline=with_timeline,
        meanwhile=meanwhile,
    )


def plan_objects(plans: Sequence[Planned], gpu: str | None = None) -> list[dict[str, Any]]:
    """The plans as JSON objects, with the keys of ``rlhfbench.planning.prediction.plan_object``.

    Args:
        plans: from ``plan``.
        gpu: the accelerator that they were made for.
    """
    from rlhfbench.planning.advice import advice
    from rlhfbench.planning.prediction import plan_object

    accelerator = None if gpu is None else find_accelerator(gpu)
    return [
        plan_object(
            planned.plan,
            accelerator,
            planned.max_batch_size,
            None if accelerator is None or planned.of_one is None else advice(planned.of_one, accelerator),
        )
        for planned in plans
    ]
