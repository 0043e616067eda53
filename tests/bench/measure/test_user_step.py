"""A user's own step: what is read of it, and what is wrong with it."""

from __future__ import annotations

import contextlib
import gc

import pytest
import torch

from rlhfbench.measure.live_tensors import TensorsSince
from rlhfbench.measure.memory import measure_memory
from rlhfbench.measure.user_step import UserStep, load_step
from rlhfkernels import Case
from rlhfkernels.errors import ModelError

CASE = Case(method="full", model="tiny", prompt_len=4, completion_len=4, batch_size=3)


class Step:
    """Notes the phases of its run; has only what it must have."""

    phases = (("rollout", "inference"), ("train", "update"))

    def run(self, observer):
        for name, _ in self.phases:
            with observer.phase(name):
                pass


class Declared(Step):
    def __init__(self, case):
        self.batch_size = case.batch_size
        self.weight = torch.nn.Parameter(torch.zeros(2))

    def persistent_tensors(self):
        return [("base", self.weight)]

    def trained_parameters(self):
        return (self.weight,)


class Observer:
    def __init__(self):
        self.seen = []

    def phase(self, name):
        self.seen.append(name)
        return contextlib.nullcontext()


def test_a_step_with_phases_and_run_is_enough():
    step, observer = UserStep(Step(), TensorsSince()), Observer()
    stats = step.run(observer)
    assert observer.seen == ["rollout", "train"]
    assert [(phase.name, phase.kind) for phase in step.phases] == [("rollout", "inference"), ("train", "update")]
    assert (list(step.persistent_tensors()), list(step.trained_parameters()), step.data_summary()) == ([], [], {})
    stats.check_finite()
    assert stats.to_dict() == {}


@pytest.mark.parametrize("phases", [[], [("a", "inference"), ("a", "update")], [(1, "update")]])
def test_phases_have_names_of_their_own(phases):
    class Wrong(Step):
        pass

    Wrong.phases = phases
    with pytest.raises(ModelError, match=r"the step's phases are .*: there must be one or more, each with a name"):
        UserStep(Wrong(), TensorsSince())


def test_a_step_is_made_for_its_case_and_its_tensors_are_passed_on():
    step = load_step(f"{__name__}:Declared", CASE)
    assert step._inner.batch_size == 3
    (declared,) = step.trained_parameters()
    assert next(iter(step.persistent_tensors())) == ("base", declared)


class Keeps(Step):
    """Keeps rows of ones of every step, and reads none of them."""

    def __init__(self, case):
        self.kept = [torch.ones(256)]

    def run(self, observer):
        for name, _ in self.phases:
            with observer.phase(name):
                self.kept.append(torch.ones(256))


def test_what_earlier_steps_kept_counts_though_no_op_reads_it():
    step = load_step(f"{__name__}:Keeps", CASE)
    gc.freeze()  # as before timed steps
    try:
        totals = [measure_memory(step, "cpu", lambda name: None).peaks["train"].total_bytes for _ in range(2)]
    finally:
        gc.unfreeze()
    assert totals == [3 * 1024, 5 * 1024]


class KeepsGradients(Step):
    """Frees its gradients at the beginning of a step: they live between steps."""

    def __init__(self, case):
        self.weight = torch.nn.Parameter(torch.zeros(256))

    def trained_parameters(self):
        return [self.weight]

    def run(self, observer):
        with observer.phase("rollout"):
            pass
        with observer.phase("train"):
            self.weight.grad = None
            self.weight.sum().backward()


def test_gradients_that_live_between_steps_are_gradients():
    step = load_step(f"{__name__}:KeepsGradients", CASE)
    measured = [measure_memory(step, "cpu", lambda name: None).peaks["rollout"].parts for _ in range(2)]
    assert [parts["gradients"] for parts in measured] == [0, 1024]
    assert [parts["temporary"] for parts in measured] == [1024, 1024]  # the weight: nothing declares it


def without_run(case):
    """Returns a step without ``run``."""
    return type("Idle", (), {"phases": ()})()


def with_a_wrong_kind(case):
    """Returns a step whose phase has a kind that there is not."""
    return type("Wrong", (Step,), {"phases": (("train", "training"),)})()


def with_names_alone(case):
    """Returns a step whose phases have no kinds."""
    return type("Bare", (Step,), {"phases": ("rollout", "train")})()


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("without_run", "step is Idle: it must have phases, a list of (name, kind), and run(observer)."),
        ("with_names_alone", "step is Bare: it must have phases, a list of (name, kind), and run(observer)."),
        ("with_a_wrong_kind", "phase train has the kind 'training': it must be inference or update."),
        ("nowhere", "has no attribute 'nowhere'."),
    ],
)
def test_a_step_that_is_none_is_one_sentence(name, sentence):
    with pytest.raises(ModelError) as caught:
        load_step(f"{__name__}:{name}", CASE)
    assert str(caught.value).endswith(sentence)


@pytest.mark.parametrize("name", ["no_such_module_of_mine:make_step", ":make_step"])
def test_a_module_that_cannot_be_imported_is_one_sentence(name):
    with pytest.raises(ModelError, match=rf"step is '{name}': it must be module:function, and"):
        load_step(name, CASE)
