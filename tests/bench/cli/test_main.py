import contextlib
import dataclasses
import inspect
import os
import re
import subprocess
import sys

import pytest

import rlhfbench
from rlhfbench.cases.sweep import DEFAULT_GRID
from rlhfbench.cli import gate as gate_verb
from rlhfbench.gate import sides
from rlhfbench.runs.max_batch import find_max_batches
from rlhfbench.runs.options import RunOptions
from rlhfkernels.config.case import Case
from rlhfkernels.config.options import Options
from rlhfkernels.config.settings import SETTINGS


def test_version_and_help(call):
    assert call("--version")[:2] == (0, f"rlhfbench {rlhfbench.__version__}\n")
    code, out, _ = call("run", "--help")
    assert code == 0
    assert "--seq-lens" in out


VERBS = ("run", "plan", "report", "watch", "gate", "verify", "evidence", "methods", "models")


@pytest.mark.parametrize("arguments", [(), *((verb,) for verb in VERBS)])
def test_help_imports_nothing_heavy(arguments):
    """Keeps ``--help`` under half a second. Newer versions of typer import pydantic to parse any command."""
    code = (
        "import sys\nfrom rlhfbench.cli import main as cli\n"
        "heavy = {'torch', 'transformers', 'pandas', 'numpy', 'matplotlib', 'psutil', 'rich', 'multiprocessing'}\n"
        "assert not (heavy | {'pydantic'}) & set(sys.modules), 'importing the verbs'\n"
        f"code = cli.invoke([*{arguments!r}, '--help'])\n"
        "sys.exit(code or sorted(heavy & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("verb", VERBS)
def test_help_ends_with_examples_that_parse_and_exit_codes(call, verb):
    code, out, _ = call(verb, "--help")
    assert code == 0
    *_, examples, exit_codes = out.strip().split("\n\n")
    assert exit_codes.split()[:2] == ["Exit", "codes:"]
    assert max(map(len, out.splitlines())) <= 80
    title, *lines = examples.splitlines()
    assert title.strip() == "Examples:"
    for line in lines:
        words = line.split()
        assert words[:2] == ["rlhfbench", verb]
        assert {word for word in words if word.startswith("--")} <= set(out.split())


def test_help_of_the_application_cuts_no_summary_and_ends_with_exit_codes(call):
    code, out, _ = call("--help")
    assert code == 0
    assert "..." not in out.split("Commands:")[1]
    assert "Exit codes: 0 done, 1 the answer is no" in out


def help_by_option(text):
    """The help of each option, on one line."""
    parts = re.split(r"^  (--[\w-]+)", text, flags=re.MULTILINE)
    return {flag: " ".join(part.split()) for flag, part in zip(parts[1::2], parts[2::2], strict=True)}


def test_help_lists_options_in_sections(call):
    out = call("run", "--help")[1]
    titles = [line for line in out.splitlines() if line.endswith(":") and not line.startswith(" ")]
    sections = ["Cases", "Training data", "Device and weights", "Ranks", "Measurement", "Cluster", "Output", "Other"]
    assert titles == [f"{section}:" for section in sections]


def test_help_states_the_real_defaults(call):
    helps = help_by_option(call("run", "--help")[1])
    options, flat, case = RunOptions(), Options().flat(), {f.name: f.default for f in dataclasses.fields(Case)}
    limit = inspect.signature(find_max_batches).parameters["limit"].default
    for flag, default in {
        "--time-budget-s": f"{options.time_budget_s:g}",
        "--case-timeout-s": f"{options.case_timeout_s:g}",
        "--max-batch-limit": limit,
        "--lora-rank": flat["lora.r"],
        "--prompt-field": flat["data.prompt_field"],
        "--seed": case["seed"],
        "--dtype": case["dtype"],
        "--methods": DEFAULT_GRID["methods"][0],
        "--setting": next(iter(SETTINGS)),
        "--model": DEFAULT_GRID["models"][0],
        "--seq-lens": f"{joined(DEFAULT_GRID['seq_lens'])}; gate: {joined(gate_verb.SMALL['seq_lens'])}",
        "--batch-sizes": f"{joined(DEFAULT_GRID['batch_sizes'])}; gate: {joined(gate_verb.SMALL['batch_sizes'])}",
    }.items():
        assert f"[default: {default}]" in helps[flag]
    gate = call("gate", "--help")[1]
    assert all(text.count("[default:") <= 1 for text in help_by_option(gate).values())


def joined(numbers):
    return ",".join(map(str, numbers))


def test_plan_takes_every_option_of_run_that_defines_a_case(call):
    def options(verb):
        return set(help_by_option(call(verb, "--help")[1]))

    only_run = {
        "--time-budget-s", "--blocks", "--case-timeout-s", "--memory-limit", "--threads", "--profile", "--with-plan",
        "--max-batch", "--max-batch-limit", "--resume", "--retry",
        "--ray", "--ray-group",
    }  # fmt: skip
    assert options("run") - options("plan") == only_run
    assert options("plan") - options("run") == {"--gpu"}


def test_the_command_alone_is_its_help(call):
    assert call() == call("--help")


def test_a_picture_needs_no_backend_of_the_users(call, monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "module://of_a_notebook")
    assert call("--version")[0] == 0
    assert os.environ["MPLBACKEND"] == "agg"


def test_a_working_folder_that_was_removed_is_one_sentence(call, monkeypatch, tmp_path):
    monkeypatch.setattr(sides, "only_gate", contextlib.nullcontext)  # a gate of another test may run
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    sentence = "the working folder or the temporary folder cannot be used: No such file or directory.\n"
    assert call("gate", "--base", "HEAD") == (2, "", sentence)
