from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from rlhfbench.errors import SweepError
from rlhfbench.evidence import sweeps
from rlhfbench.evidence.parts import PARTS
from rlhfbench.evidence.request import FULL, MINIATURE, Request, parse_parts
from rlhfbench.planning.predict import plan_case
from rlhfkernels import CaseError


def test_parts_are_numbers_joined_by_commas() -> None:
    assert parse_parts(None, PARTS) == [1, 2, 3, 4, 5, 6, 7]
    assert parse_parts("3, 1,3", PARTS) == [3, 1]
    with pytest.raises(SweepError) as error:
        parse_parts("0,1,x", PARTS)
    assert [problem.split(":")[0] for problem in error.value.problems] == ["--parts has '0'", "--parts has 'x'"]
    with pytest.raises(SweepError, match=r"^--parts has '1{56}\.\.\.: it must be numbers from 1 to 7, joined by"):
        parse_parts("1" * 5000, PARTS)


def test_the_device_decides_model_and_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlhfbench.evidence.request.num_cuda_devices", lambda: 0)
    assert Request.of(None, None) == Request(model="tiny", device="cpu", sizes=MINIATURE)
    monkeypatch.setattr("rlhfbench.evidence.request.num_cuda_devices", lambda: 1)
    assert Request.of(None, None) == Request(model="llama-7b", device="cuda", sizes=FULL)
    assert Request.of("gpt2", "cpu") == Request(model="gpt2", device="cpu", sizes=MINIATURE)
    assert Request.of("gpt2", "cpu", 7).sizes == dataclasses.replace(MINIATURE, blocks=7)
    with pytest.raises(CaseError, match="device"):
        Request.of("gpt2", "tpu")


def test_the_cases_are_those_of_table_1() -> None:
    case = Request(model="llama-7b", device="cuda", sizes=FULL).case("hydra")
    assert (case.prompt_len, case.completion_len, case.options.lora.r, case.dtype) == (400, 400, 128, "bfloat16")


def test_a_request_is_read_as_it_was_written(tmp_path: Path) -> None:
    request = Request(model="tiny", device="cpu", sizes=MINIATURE)
    request.write(tmp_path / "out")
    assert Request.read(tmp_path / "out") == request


def test_the_largest_batch_is_the_last_that_fits_by_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = dataclasses.replace(MINIATURE, batch_size=None)
    request = Request(model="tiny", device="cpu", sizes=sizes)
    cases = [request.case("joined-hydra"), request.case("full")]
    limit = plan_case(dataclasses.replace(cases[0], batch_size=7)).total_bytes
    assert plan_case(cases[1]).total_bytes > limit
    monkeypatch.setattr(sweeps, "usable_bytes", lambda device: limit)
    found = [case for each in cases for case in sweeps.largest(request, tmp_path, [each])]
    assert [(case.method, case.batch_size) for case in found] == [("joined-hydra", 7)]
    monkeypatch.setattr(sweeps, "plan_kinds", lambda *arguments, **options: pytest.fail("it planned again"))
    assert sweeps.largest(request, tmp_path, cases) == found


def test_a_step_may_take_the_device_without_its_reserve_and_no_more_than_the_papers_total(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for gib, most in ((24, 24), (141, 71.1)):
        monkeypatch.setattr(sweeps, "device_bytes", lambda device, gib=gib: gib * 2**30)
        assert 0.9 * most * 2**30 < sweeps.usable_bytes("cuda") <= most * 2**30
