import dataclasses
import errno
import resource
from types import SimpleNamespace

import pytest
import torch

import rlhfbench.measure
from rlhfbench.runs import worker
from rlhfkernels.config.case import Case
from rlhfkernels.errors import CaseError, DataError, ModelError, NumericalError

CASE = Case(method="hydra", model="tiny", prompt_len=4, completion_len=4, batch_size=1)
SETTINGS = {"time_budget_s": 1.0, "precision": 0.1, "num_threads": 1, "profile_dir": None}


@pytest.fixture
def run(monkeypatch):
    """Runs a case with ``measure`` in place of ``measure_case``; returns the messages."""

    def run(measure, case=CASE):
        monkeypatch.setattr(rlhfbench.measure, "measure_case", measure)
        sent = []
        worker.run_case({"case": case.to_dict(), "settings": SETTINGS, "memory_limit_bytes": None}, sent.append)
        return sent

    return run


def failing(error):
    def measure(case, settings, notify, step_begins):
        notify("timing")
        notify("phase:generate")
        raise error

    return measure


def test_the_measurement_is_the_result(run):
    def measure(case, settings, notify, step_begins):
        notify("build")
        assert case == CASE
        assert settings.time_budget_s == 1.0
        return {"memory": {"total_bytes": 1}}

    assert run(measure)[-2:] == [
        {"notify": "build"},
        {"result": {"outcome": "ok", "error": None, "memory": {"total_bytes": 1}}},
    ]


def test_a_plan_is_the_memory_that_is_predicted():
    sent = []
    worker.run_case({"case": CASE.to_dict(), "plan": True}, sent.append)
    assert sent[0] == {"notify": "plan"}
    result = sent[-1]["result"]
    assert (result["outcome"], result["error"]) == ("ok", None)
    memory = result["memory"]
    assert memory["total_bytes"] == sum(memory["parts"].values()) > 2**20


def test_a_plan_that_fails_says_why(capsys):
    sent = []
    case = {**CASE.to_dict(), "model": "./absent"}
    worker.run_case({"case": case, "plan": True}, sent.append)
    error = sent[-1]["result"]["error"]
    assert (error["kind"], error["phase"]) == ("ModelError", "plan")
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), "oom"),
        (MemoryError(), "oom"),
        (RuntimeError("std::bad_alloc"), "oom"),
        (RuntimeError("CUDA_ERROR_OUT_OF_MEMORY"), "oom"),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), "oom"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "oom"),
        (CaseError(["prompt_len is 9: too long."]), "invalid"),
        (ModelError("no such model"), "invalid"),
        (DataError("empty"), "invalid"),
        (NumericalError("the loss is nan"), "invalid"),
        (RuntimeError("shapes do not match"), "crashed"),
        (ValueError("out of memory"), "crashed"),
        (OSError(errno.ENOENT, "absent"), "crashed"),
        (SystemExit(3), "crashed"),
        (KeyboardInterrupt(), "crashed"),
    ],
)
def test_every_error_is_an_outcome_that_names_its_phase(run, capsys, error, outcome):
    result = run(failing(error))[-1]["result"]
    assert result["outcome"] == outcome
    assert result["error"]["kind"] == type(error).__name__
    assert result["error"]["phase"] == "generate"
    assert result["error"]["message"]
    assert "Traceback" in capsys.readouterr().err


def test_torchs_message_for_out_of_memory_on_a_cpu_is_oom(run, capsys):
    def measure(case, settings, notify, step_begins):
        torch.empty(2**50, dtype=torch.uint8)

    assert run(measure)[-1]["result"]["outcome"] == "oom"
    assert "RuntimeError" in capsys.readouterr().err


def test_an_error_caused_by_out_of_memory_is_oom(run):
    def measure(case, settings, notify, step_begins):
        try:
            bytearray(2**62)
        except MemoryError as error:
            raise ModelError("cannot be loaded") from error

    assert run(measure)[-1]["result"]["outcome"] == "oom"


def test_a_case_that_breaks_a_rule_is_invalid(capsys):
    sent = []
    data = {**CASE.to_dict(), "batch_size": 0}
    worker.run_case({"case": data, "settings": SETTINGS, "memory_limit_bytes": None}, sent.append)
    assert sent[-1]["result"]["outcome"] == "invalid"
    assert "batch_size is 0" in sent[-1]["result"]["error"]["message"]
    assert "Traceback" in capsys.readouterr().err


def test_a_message_is_one_line_of_bounded_length():
    error = worker.failure(RuntimeError("a\n  b " + "x" * 1000), None)["error"]
    assert error["message"].startswith("a b xxx")
    assert len(error["message"]) == 500


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (AssertionError(), "AssertionError."),
        (SystemExit(0), "SystemExit 0."),
        (SystemExit(), "SystemExit."),
        (KeyError("labels"), "KeyError 'labels'."),
        (ValueError("rows is 0."), "rows is 0."),
    ],
)
def test_an_error_whose_text_says_nothing_is_named_by_its_kind(error, message):
    assert worker.failure(error, None)["error"]["message"] == message


def test_a_cyclic_chain_of_errors():
    first, second = RuntimeError("a"), RuntimeError("b")
    first.__context__, second.__context__ = second, first
    assert not worker.is_out_of_memory(first)


def test_the_memory_limit_covers_the_step_but_not_the_ceilings(monkeypatch):
    seen = []

    def measure(case, settings, notify, step_begins):
        seen.append(resource.getrlimit(resource.RLIMIT_DATA)[0])
        step_begins()
        seen.append(resource.getrlimit(resource.RLIMIT_DATA)[0])
        return {}

    monkeypatch.setattr(rlhfbench.measure, "measure_case", measure)
    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    try:
        worker.run_case({"case": CASE.to_dict(), "settings": SETTINGS, "memory_limit_bytes": 2**40}, lambda m: None)
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (hard, hard))
    assert seen[0] == hard != seen[1]


def test_a_rank_says_how_many_phases_it_has_entered_and_whether_it_steps():
    """Not while the profile is written, which rank 0 does alone."""
    sent = []
    stage = worker.Stage(sent.append, is_rank=True)
    stage.notify("build")
    stage.notify("phase:generate")
    stage.enter("update")
    stage.notify("memory")
    stage.notify("profile")
    stage.notify("phase:generate")
    found = [(message["phase"], message["is_stepping"]) for message in sent if "phase" in message]
    assert found == [
        ("build", False),
        ("generate", True),
        ("update", True),
        ("memory", True),
        ("profile", False),
        ("generate", False),
    ]


@pytest.mark.parametrize(("device", "index"), [("cuda", 0), ("cuda:1", 1)])
def test_the_memory_limit_of_a_cuda_device_is_a_share_of_its_memory(monkeypatch, device, index):
    shares = []
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=80))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda.memory, "_lazy_init", lambda: None)
    monkeypatch.setattr(torch._C, "_cuda_setMemoryFraction", lambda *given: shares.append(given), raising=False)
    for limit_bytes in (20, 200):
        worker.limit_memory(device, limit_bytes)
    assert shares == [(0.25, index), (1.0, index)]


def test_a_case_makes_its_cuda_device_the_current_one(run, monkeypatch):
    calls = []
    monkeypatch.setattr(torch.cuda, "set_device", calls.append)

    def measure(case, settings, notify, step_begins):
        calls.append("measure")
        return {}

    for device in ("cuda:1", "cuda", "cpu"):
        run(measure, dataclasses.replace(CASE, device=device))
    assert calls == ["cuda:1", "measure", "measure", "measure"]
