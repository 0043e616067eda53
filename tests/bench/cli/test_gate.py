import contextlib
import json
import tempfile
from pathlib import Path

import pytest

import rlhfbench.gate.baseline
from rlhfbench.cases import preflight
from rlhfbench.gate import sides
from rlhfbench.gate.compare import default_threads
from rlhfbench.records.file import read_records
from rlhfbench.runs import environment
from rlhfbench.runs.folder import RunFolder
from rlhfbench.runs.runner import RunResult

SMALL = ("--methods", "hydra", "--seq-lens", "8", "--batch-sizes", "1")


@pytest.fixture(autouse=True)
def own_lock(monkeypatch, tmp_path_factory):
    """Gives these gates a lock of their own: a gate that this machine's user runs holds the usual one."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path_factory.mktemp("temporary")))


def kind(name):
    return ("--option", f"data.prompt_field={name}")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((), "one of --base, --baseline, --self-test and --bisect must be given, and only one."),
        (("--base", "a", "--self-test"), "one of --base, --baseline, --self-test and --bisect must be given"),
        (("--base", "a", "--memory-only"), "--update-baseline and --memory-only need --baseline RUN."),
        (("--base", "a", "--budget-s", "0"), "--budget-s is 0: it must be from 4"),
        (("--base", "a", "--budget-s", "nan"), "--budget-s is nan"),
        (("--baseline", "a", "--budget-s", "60"), "--baseline takes no --budget-s: each side is one run"),
        (("--base", "a", "--smallest-effect", "0.2"), "--promised-effect is 0.05: it must be above --smallest-effect"),
        (("--base", "a", "--smallest-effect", "-1"), "--smallest-effect is -1: it must be above 0 and below 10."),
        (("--base", "a", "--step", "mine"), "--step is 'mine': it must be MODULE:FUNCTION."),
        (("--base", "a", "--step", "bench/step.py:make"), "its module must be named as in an import, such as"),
        (("--base", "a", "--step", "step.py:make"), "--step is 'step.py:make': its module must be named as in an"),
        (("--base", "a", "--step", ".step:make"), "--step is '.step:make': its module must be named as in an import"),
        (("--base", "a", "--threads", "0"), "--threads is 0: it must be from 1 to 1024."),
        (("--base", "a"), "lies in no git repository that can be compared"),
        (("--bisect", "a", "b"), "lies in no git repository that can be compared"),
        (("--baseline", "nowhere"), "baseline 'nowhere' holds no run"),
        (("--baseline", "nowhere", "--methods", "hydra"), "--baseline takes no cases"),
        (("--baseline", "nowhere", "--threads", "2"), "--baseline takes no cases and no --threads"),
        (("--baseline", "nowhere", "--step", "a:b"), "--step needs --base, --bisect or --self-test."),
        (
            ("--baseline", "new", "--update-baseline", "--out", "new"),
            "--out 'new' lies in --baseline 'new': name another folder, or leave it out.",
        ),
        (("--baseline", "new", "--update-baseline", "--out", "./new/x"), "--out './new/x' lies in --baseline 'new'"),
    ],
)
def test_a_wrong_gate_is_one_sentence(call, monkeypatch, tmp_path, arguments, sentence):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    code, out, err = call("gate", *arguments)
    assert (code, out) == (2, "")
    assert err.startswith(sentence) or sentence in err
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_second_gate_on_the_machine_is_refused(call):
    with sides.only_gate():
        code, out, err = call("gate", "--base", "HEAD")
    assert (code, out) == (2, "")
    assert err.startswith("another gate of yours runs on this machine")


def test_a_gate_against_a_stored_run(call, fake, monkeypatch, tmp_path):
    assert call("run", *SMALL, *kind("steady"), "--blocks", "2", "--out", "stored")[0] == 0
    code, out, _ = call("gate", "--baseline", "stored", "--out", "new", "--update-baseline")
    assert code == 0
    assert out.startswith("**No regression.**")
    assert out.endswith("\nThe baseline in stored is now this run.\n")
    assert read_records("stored") == read_records("new")
    assert call("gate", "--baseline", "stored")[0] == 0
    assert {path.name for path in tmp_path.iterdir()} == {"stored", "new"}  # without --out nothing is kept
    path = tmp_path / "stored" / "environment.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "host": "another"}))
    code, out, _ = call("gate", "--baseline", "stored", "--out", "later", "--json")
    assert code == 3
    reasons = {found["reason"] for found in json.loads(out)["findings"]}
    assert any(reason and reason.startswith("Times are not judged: host") for reason in reasons)
    assert call("gate", "--baseline", "stored", "--out", "last", "--memory-only")[0] == 0


def test_a_new_run_in_the_baseline_that_it_would_replace_is_refused(call, fake, tmp_path):
    assert call("run", *SMALL, *kind("steady"), "--blocks", "2", "--out", "stored")[0] == 0
    before = sorted((tmp_path / "stored").rglob("*"))
    code, out, err = call("gate", "--baseline", "stored", "--update-baseline", "--out", "stored/x")
    assert (code, out) == (2, "")
    assert err.startswith("--out 'stored/x' lies in --baseline 'stored'")
    assert sorted((tmp_path / "stored").rglob("*")) == before


@pytest.mark.parametrize(
    ("source", "title"),
    [
        ({"commit": "0123456789abcdef", "dirty": True}, "a new run at 0123456789 with uncommitted changes"),
        ({"commit": "0123456789abcdef", "dirty": False}, "a new run at 0123456789"),
        ({"commit": None, "dirty": None}, "a new run"),
    ],
)
def test_a_new_run_is_told_by_its_commit(call, fake, monkeypatch, source, title):
    monkeypatch.setattr(environment, "source", lambda *folders: source)
    code, out, _ = call("gate", "--baseline", "stored", "--update-baseline", *SMALL, *kind("steady"))
    assert (code, f" {title} against the run in stored." in out) == (3, True)
    code, out, _ = call("gate", "--baseline", "stored", "--json")
    assert (json.loads(out)["base"], json.loads(out)["head"]) == ("the run in stored", title)


def test_a_first_baseline_is_made(call, fake, tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    table = tmp_path / "table.md"
    first = ("gate", "--update-baseline", *SMALL, *kind("steady"), "--summary", str(table))
    code, out, err = call(*first, "--baseline", "new")
    assert code == 3, err  # nothing was compared
    assert out.endswith("\nThe baseline in new is new: there was nothing to compare with.\n")
    assert table.read_text() == out
    code, out, _ = call(*first, "--baseline", "other", "--json")
    assert (code, json.loads(out)["exit_code"], json.loads(out)["findings"]) == (3, 3, [])
    assert json.loads(out)["note"] == "The baseline in other is new: there was nothing to compare with."
    (tmp_path / "empty").mkdir()
    assert call("gate", "--baseline", "empty", "--update-baseline", *SMALL, *kind("steady"))[0] == 3
    # A core is left free, as in any gate.
    assert RunFolder("new").settings()["num_threads"] == default_threads() is not None
    assert call("gate", "--baseline", "new")[0] == 0


def test_a_run_with_a_case_that_failed_is_no_baseline(call, fake, tmp_path):
    sentence = "The run is not stored as a baseline: case hydra 4+4 x1 failed: crashed: it exited with status 7"
    code, out, _ = call("gate", "--baseline", "new", "--update-baseline", *SMALL, *kind("exit"))
    assert code == 3
    assert sentence in out
    assert not (tmp_path / "new").exists()
    assert call("run", *SMALL, *kind("exit"), "--out", "stored")[0] == 3
    before = (tmp_path / "stored" / "records.jsonl").read_bytes()
    code, out, _ = call("gate", "--baseline", "stored", "--update-baseline", "--json")
    assert code == 3
    assert json.loads(out)["note"].startswith(sentence)
    assert (tmp_path / "stored" / "records.jsonl").read_bytes() == before


def test_an_interrupted_gate_leaves_the_baseline_as_it_was(call, fake, monkeypatch, tmp_path):
    assert call("run", *SMALL, *kind("steady"), "--blocks", "2", "--out", "stored")[0] == 0
    before = (tmp_path / "stored" / "records.jsonl").read_bytes()
    interrupted = RunResult(run_dir=tmp_path / "x", records=[], interrupted=True)
    monkeypatch.setattr(rlhfbench.gate.baseline, "run_sweep", lambda *args, **kwargs: interrupted)
    assert call("gate", "--baseline", "stored", "--update-baseline")[:2] == (130, "")
    assert (tmp_path / "stored" / "records.jsonl").read_bytes() == before


@pytest.fixture
def compared(monkeypatch):
    """Notes the cases and the options of each comparison, which finds nothing; both sides are stand-ins."""
    seen = []

    def run(base, head, cases, folder, options):
        seen.append((cases, options))
        return []

    side = sides.Side(name="base", title="abc")
    monkeypatch.setattr("rlhfbench.cli.gate._compare", run)
    monkeypatch.setattr(sides, "repository", Path)
    monkeypatch.setattr(sides, "module_roots", lambda root, with_working_folder: [])
    monkeypatch.setattr(sides, "head_side", lambda root, roots, step: side)
    monkeypatch.setattr(sides, "unedited", lambda root, roots: contextlib.nullcontext())
    monkeypatch.setattr(sides, "checked_out", lambda *_, step: contextlib.nullcontext(side))
    monkeypatch.setattr(sides, "sameness", lambda base, root: "")
    return seen


def test_a_users_step_is_one_case(call, compared):
    """The method only names it: five would be one step, measured five times."""
    for arguments in ((), ("--step", "mine:make"), ("--step", "mine:make", "--methods", "lora,hydra")):
        call("gate", "--base", "a", *arguments)
    assert [len(sweep.cases) for sweep, _ in compared] == [5, 1, 2]


def test_a_device_that_the_machine_lacks_is_one_sentence_for_a_step_too(call, compared, monkeypatch):
    monkeypatch.setattr(preflight, "num_cuda_devices", lambda: 0)
    code, _, err = call("gate", "--base", "a", "--step", "mine:make", "--device", "cuda")
    assert (code, err) == (2, "device 'cuda': this machine has no CUDA device.\n")
    assert compared == []


@pytest.mark.parametrize(
    ("arguments", "timeout_s"), [((), 600), (("--budget-s", "8"), 600), (("--budget-s", "90"), 900)]
)
def test_a_slow_step_has_time_for_a_pair(call, compared, arguments, timeout_s):
    """A pair has at least ten steps: a process that is killed after 600 s allows none of a minute."""
    call("gate", "--base", "a", *arguments)
    assert [options.case_timeout_s for _, options in compared] == [timeout_s]


def test_a_stored_run_of_other_data_is_refused(call, fake, tmp_path):
    """The code would be blamed for what other rows take."""
    data = tmp_path / "p.jsonl"
    data.write_text('{"steady": "hello"}\n')
    flags = ("--prompts", "p.jsonl", *kind("steady"), "--blocks", "2")
    assert call("run", *SMALL, *flags, "--out", "stored")[0] == 0
    assert call("gate", "--baseline", "stored")[0] == 0
    data.write_text('{"steady": "good bye"}\n')
    code, out, err = call("gate", "--baseline", "stored")
    sentence = f"data file '{data}' is not that of baseline 'stored': make a new one in another folder.\n"
    assert (code, out, err) == (2, "", sentence)
