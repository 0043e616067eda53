from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import rlhfbench
from rlhfbench.cases.sweep import Sweep
from rlhfbench.cli import main as cli
from rlhfbench.cli import plan_output
from rlhfbench.errors import RunFolderError
from rlhfbench.planning import devices
from rlhfbench.planning.max_batch import MAX_BATCH_SIZE
from rlhfbench.planning.plans import plan_objects
from rlhfbench.records.timelines import read_timeline
from rlhfbench.runs import drawing
from rlhfkernels import Case

SMALL = ("--seq-lens", "12", "--batch-sizes", "1,2", "--methods", "joined-hydra", "--dtype", "bfloat16")


def test_json_is_one_object_a_case(
    make_case: Callable[..., Case], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    model = make_case().model
    code = cli.invoke(["plan", "--model", model, *SMALL, "--gpu", "a100-80gb", "--json", "--out", str(tmp_path / "p")])
    assert code == 0
    plans = json.loads(capsys.readouterr().out)
    assert [plan["case"]["batch_size"] for plan in plans] == [1, 2]
    for plan in plans:
        assert set(plan) == {"case", "memory", "zero", "fits", "max_batch_size", "advice", "floor"}
        assert (plan["fits"], plan["advice"]) == (True, None)
        assert plan["memory"]["total_bytes"] == sum(plan["memory"]["parts"].values())
        assert plan["floor"]["total_s_per_sample"] > 0
    assert plans[0]["max_batch_size"] == plans[1]["max_batch_size"] == MAX_BATCH_SIZE
    assert {path.name for path in (tmp_path / "p").iterdir()} == {"plan.json", "plan.png", "plan.svg", "timelines"}
    for plan in plans:
        timeline = read_timeline(tmp_path / "p" / "timelines", plan["case"]["id"])
        assert timeline["peak"]["total_bytes"] == plan["memory"]["total_bytes"]
        assert timeline["peak"]["phase"] == plan["memory"]["peak_phase"]
        assert {"base", "rollout", "activations"} <= set(timeline["tensors"]["part"])
        assert (tmp_path / "p" / "timelines" / f"{plan['case']['id']}.png").is_file()


def test_timelines_are_drawn_of_the_first_cases(
    make_case: Callable[..., Case], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(drawing, "MAX_TIMELINES", 1)
    asked = ["plan", "--model", make_case().model, *SMALL, "--json", "--out", str(tmp_path / "p")]
    assert cli.invoke(asked) == 0
    first, second = (plan["case"]["id"] for plan in json.loads(capsys.readouterr().out))
    timelines = tmp_path / "p" / "timelines"
    assert read_timeline(timelines, first) is not None
    assert read_timeline(timelines, second) is not None
    assert [path.name for path in timelines.glob("*.png")] == [f"{first}.png"]


def test_a_plan_replaces_the_timelines_of_an_older_one_alone(
    make_case: Callable[..., Case], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder, kept = tmp_path / "p", tmp_path / "p" / "timelines" / "kept.txt"
    kept.parent.mkdir(parents=True)
    kept.touch()
    asked = ["plan", "--model", make_case().model, "--methods", "sft", "--seq-lens", "8", "--out", str(folder)]
    ids = []
    for size in ("1", "2"):
        assert cli.invoke([*asked, "--batch-sizes", size, "--json"]) == 0
        ids += [plan["case"]["id"] for plan in json.loads(capsys.readouterr().out)]
        assert kept.exists() == (size == "1")  # no plan was there before the first
        assert [read_timeline(kept.parent, each) is not None for each in ids] == [each == ids[-1] for each in ids]


def test_a_package_that_only_drawing_needs_is_named(
    make_case: Callable[..., Case], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "rlhfreports.plans", None)
    asked = ["plan", "--model", make_case().model, "--methods", "sft", "--seq-lens", "8", "--batch-sizes", "1"]
    assert cli.invoke(asked) == 2
    printed = capsys.readouterr()
    assert (printed.out, len(printed.err.splitlines())) == ("", 1)
    assert printed.err.startswith("the plan cannot be drawn: ")
    with pytest.raises(RunFolderError, match=r"^the plan cannot be drawn: .*rlhfreports\.plans"):  # of several cases
        plan_output.import_libraries()


def test_a_plan_needs_no_more_of_a_model_than_its_configuration(
    make_case: Callable[..., Case], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = Path(make_case().model)
    asked = ["plan", "--methods", "sft", "--seq-lens", "8", "--batch-sizes", "1", "--json", "--model"]
    totals = []
    (tmp_path / "config.json").write_text((checkpoint / "config.json").read_text())
    for folder in (checkpoint, tmp_path):
        assert cli.invoke([*asked, str(folder)]) == 0
        (plan,) = json.loads(capsys.readouterr().out)
        totals.append(plan["memory"]["total_bytes"])
    assert totals[0] == totals[1] > 0
    assert cli.invoke(["run", *asked[1:], str(tmp_path)]) == 2
    assert "is a folder without weights" in capsys.readouterr().err


def test_a_case_that_does_not_fit_comes_with_advice(
    make_case: Callable[..., Case], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "_CONTEXT_BYTES", 0)
    asked = ["plan", "--model", make_case().model, "--methods", "lora", "--seq-lens", "4", "--batch-sizes", "1,2"]
    asked += ["--lora-rank", "2", "--gpu", "10kB", "--option", "engine.cuda_graphs=off"]  # their pool is 2 MiB
    assert cli.invoke(asked) == 0
    # Of both batch sizes it is the same answer, and given once.
    (told,) = [line for line in capsys.readouterr().out.splitlines() if "does not fit" in line]
    assert told.startswith(
        "LoRA-PPO at 4 tokens does not fit on 10kB even at batch 1: its largest part is base with 0.000"
    )
    assert told.endswith(
        "GiB, and what would help is a method with fewer bases (dynamic-lora, joined-hydra, hydra), --dtype bfloat16, "
        "--zero-stage 3 over several ranks or a smaller model."
    )
    assert cli.invoke([*asked, "--json"]) == 0
    plans = json.loads(capsys.readouterr().out)
    assert [(plan["fits"], plan["max_batch_size"], plan["advice"]) for plan in plans] == [(False, 0, told)] * 2


def test_a_device_smaller_than_its_reserve(make_case: Callable[..., Case], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.invoke(["plan", "--model", make_case().model, *SMALL, "--gpu", "100MB"]) == 2
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", "gpu is '100MB': it must be above 0.77 GiB, which CUDA itself takes.\n")


def test_batch_sizes_over_all_ranks_are_divided(
    make_case: Callable[..., Case], capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--zero-stage", "1", "--world-size", "2", "--global-batch", "--batch-sizes", "4", "--json"]
    assert cli.invoke(["plan", "--model", make_case().model, *SMALL, *flags]) == 0
    (plan,) = json.loads(capsys.readouterr().out)
    assert (plan["case"]["batch_size"], plan["zero"]["global_batch_size"]) == (2, 4)


def test_every_stage_and_world_size_is_planned(
    make_case: Callable[..., Case], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "250")
    asked = ["plan", "--model", make_case().model, "--methods", "sft", "--seq-lens", "12", "--batch-sizes", "1"]
    asked += ["--parallel", "deepspeed,ddp", "--zero-stage", "1,2", "--world-size", "2,8"]
    assert cli.invoke(asked) == 0
    text = capsys.readouterr().out
    rows = [line.split()[:5] for line in text.splitlines() if line.split()[:1] == ["SFT"]]
    kinds = [(strategy, size) for strategy in ("DDP", "ZeRO-1", "ZeRO-2") for size in "28"]
    assert sorted(rows) == sorted(["SFT", strategy, size, "12", "1"] for strategy, size in kinds)
    assert cli.invoke([*asked, "--json"]) == 0
    zeros = [plan["zero"] for plan in json.loads(capsys.readouterr().out)]
    assert [zero["global_batch_size"] for zero in zeros] == [zero["world_size"] for zero in zeros]
    assert {(zero["stage"], zero["world_size"]) for zero in zeros} == {(s, n) for s in range(3) for n in (2, 8)}


def test_what_all_plans_share_is_in_the_caption(
    make_case: Callable[..., Case], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "250")
    asked = ["plan", "--model", make_case().model, *SMALL, "--zero-stage", "1", "--world-size", "8"]
    assert cli.invoke(asked) == 0
    (caption,) = [line for line in capsys.readouterr().out.splitlines() if "one rank of 8" in line]
    assert "bfloat16" in caption
    assert "ZeRO-1, one rank of 8" in caption
    assert "parallel." not in caption


def test_the_memory_of_a_small_device_stands_in_the_caption(
    make_case: Callable[..., Case], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "250")
    asked = ["plan", "--model", make_case().model, "--methods", "sft", "--seq-lens", "8", "--batch-sizes", "1"]
    assert cli.invoke([*asked, "--gpu", "1.5GiB"]) == 0
    assert "1.5GiB: 1.5 GiB, 0.8 of it reserved" in " ".join(capsys.readouterr().out.split())


def test_plans_of_two_settings_are_interleaved(
    make_case: Callable[..., Case], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "250")
    asked = ["plan", "--model", make_case().model, *SMALL, "--setting", "paper,modern", "--lora-rank", "4"]
    assert cli.invoke(asked) == 0
    text = capsys.readouterr().out
    rows = [line.split()[:4] for line in text.splitlines() if "J-Hydra-PPO" in line]
    assert rows == [["J-Hydra-PPO", setting, "12", batch] for batch in "12" for setting in ("paper", "modern")]
    assert "bfloat16 · LoRA rank 4" in text
    assert cli.invoke([*asked, "--json"]) == 0
    options = [plan["case"]["options"] for plan in json.loads(capsys.readouterr().out)]
    assert [given["engine"]["attn_implementation"] for given in options] == ["eager", "auto"] * 2


def test_plans_of_several_lora_ranks_and_options_are_told_apart(
    make_case: Callable[..., Case], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    file = tmp_path / "sweep.toml"
    file.write_text(
        f'models = "{make_case().model}"\nmethods = ["joined-hydra"]\nseq_lens = [12]\nbatch_sizes = [1]\n'
        "[options]\nlora.r = [2, 4]\nengine.gradient_checkpointing = [false, true]\nppo.gamma = 0.9\n"
    )
    assert cli.invoke(["plan", "--sweep", str(file)]) == 0
    rows = [line.split()[:3] for line in capsys.readouterr().out.splitlines() if "J-Hydra-PPO" in line]
    words = ("12", "engine.gradient_checkpointing=True")  # the length, or the options before it
    assert sorted(rows) == sorted(["J-Hydra-PPO", rank, word] for rank in "24" for word in words)


def test_advice_names_the_model_among_several() -> None:
    plans = [{"case": {"model": model}, "advice": said} for model, said in (("a", "No."), ("a", "No."), ("b", None))]
    assert plan_output.advice(plans) == ["a: No."]
    assert plan_output.advice(plans[:2]) == ["No."]


def test_the_device_is_cuda_by_default_and_can_be_the_cpu(
    make_case: Callable[..., Case], capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["plan", "--model", make_case().model, "--methods", "hydra", "--seq-lens", "8", "--batch-sizes", "1"]
    asked += ["--seed", "3", "--json"]
    totals = {}
    for device in ("cuda", "cpu"):
        assert cli.invoke([*asked, *(["--device", device] if device == "cpu" else [])]) == 0
        (plan,) = json.loads(capsys.readouterr().out)
        assert (plan["case"]["device"], plan["case"]["seed"]) == (device, 3)
        totals[device] = plan["memory"]["total_bytes"]
    assert totals["cpu"] < totals["cuda"]  # CUDA's allocator rounds every storage up to a block
    assert cli.invoke([*asked, "--option", "engine.backend=native"]) == 2
    assert "so device must be 'cpu'." in capsys.readouterr().err


def test_a_case_and_a_sweep_are_planned_from_python(make_case: Callable[..., Case]) -> None:
    case = make_case("hydra", device="cuda", dtype="float32")
    (planned,) = rlhfbench.plan(case, gpu="24GiB", zero_stage=1, world_size=2, with_timeline=True)
    assert planned.plan.case == case
    assert planned.plan.zero.world_size == 2
    assert planned.plan.timeline is not None
    assert planned.max_batch_size >= case.batch_size
    other = dataclasses.replace(case, method="lora")
    plans = rlhfbench.plan(rlhfbench.Sweep(cases=(case, other)))
    assert [item.plan.case for item in plans] == [case, other]
    assert {item.max_batch_size for item in plans} == {None}
    with pytest.raises(rlhfbench.SweepError, match="too long for model"):
        rlhfbench.plan(dataclasses.replace(case, prompt_len=5000))


@pytest.mark.parametrize("name", ["sweep.toml", "records.jsonl"])
def test_a_plan_is_not_written_over_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    """A case has the same id in both, and its measured timeline the same name as the planned one."""
    (tmp_path / name).touch()
    asked = ["plan", "--model", "tiny", "--methods", "sft", "--seq-lens", "8", "--batch-sizes", "1"]
    assert cli.invoke([*asked, "--out", str(tmp_path)]) == 2
    printed, sentence = capsys.readouterr(), "holds a run, whose timelines a plan would replace: name another folder."
    assert (printed.out, printed.err) == ("", f"out '{tmp_path}' {sentence}\n")
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_without_a_gpu_no_plan_states_whether_it_fits(make_case: Callable[..., Case]) -> None:
    sweep = Sweep.from_spec(
        {"models": make_case().model, "methods": ["hydra"], "seq_lens": [8], "batch_sizes": [1], "device": "cuda"}
    )
    (plan,) = plan_objects(rlhfbench.plan(sweep))
    assert (plan["fits"], plan["max_batch_size"], plan["floor"]["gpu"]) == (None, None, None)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (("--gpu", "a1000"), "gpu 'a1000' is unknown: did you mean 'a10'"),
        (("--gpu", "-3GiB"), "gpu '-3GiB' is unknown"),
        (
            ("--zero-stage", "4", "--world-size", "2"),
            "parallel.zero_stage is 4: it must be an integer from 0 to 3.",
        ),
        (("--zero-stage", "1"), "--zero-stage is 1: it needs --world-size N."),
        (("--world-size", "0"), "--world-size has 0: every value must be an integer of at least 1."),
        (("--world-size", "2,two"), "--world-size has 'two': it must list integers, joined by commas."),
        (("--world-size", "2", "--global-batch"), "batch_sizes has 1: with --global-batch it must be a multiple of"),
        (("--setting", "papr"), "setting 'papr' is unknown: did you mean 'paper'? Valid: modern, paper."),
        (("--setting", "modern,"), "setting '' is unknown: Valid: modern, paper."),
        (("--seq-lens", "9999"), "positions"),
        (("--methods", "hydr"), "method 'hydr' is unknown: did you mean 'hydra'"),
    ],
)
def test_each_mistake_is_one_sentence_and_exit_code_2(
    flags: tuple[str, ...], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.invoke(["plan", "--model", "tiny", "--seq-lens", "8", "--batch-sizes", "1", *flags]) == 2
    said = capsys.readouterr().err
    assert sentence in said
    assert "Traceback" not in said
