"""The README and the manual: their code runs, and their figures are those of kept runs.

The blocks of a page run in order in an empty folder. A block with a title is first written as that file.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import typer

from rlhfbench.cli.cases import CaseOptions, make_sweep
from rlhfbench.cli.main import app, invoke
from rlhfbench.evidence.parts import PARTS
from rlhfbench.evidence.request import Request, parse_parts
from rlhfbench.records.file import read_records
from rlhfkernels.config.options import RENAMED_OPTIONS
from rlhfkernels.methods.table import METHODS

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "reports" / "results"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

_TINY = "--model tiny --seq-lens 16 --batch-sizes 1 --time-budget-s 0.05 --threads 1 --blocks 2"
# Commands that run, with flags that make them small.
RUN = {
    "rlhfbench run --model smollm2-135m --methods lora,hydra --seq-lens 128,256 --batch-sizes 4 --out my-run": _TINY,
    "rlhfbench run --resume my-run": "",
    "rlhfbench report my-run": "",
    "rlhfbench report my-run --paper": "",
    "rlhfbench methods": "",
    "rlhfbench methods --options": "",
    "rlhfbench models": "",
    "rlhfbench run --methods hydra,sft,dpo --prompts prompts.jsonl --demonstrations demonstrations.jsonl "
    "--pairs pairs.jsonl": f"--methods hydra,sft-lora,dpo-lora {_TINY}",
    "rlhfbench plan --model tiny --methods hydra --seq-lens 64 --batch-sizes 2 --gpu 24GiB": "",
    "rlhfbench plan --model tiny --methods dpo-lora --seq-lens 64 --batch-sizes 2 --option dpo.forward=two-pass": "",
    "rlhfbench plan --model tiny --methods dpo --seq-lens 64 --option dpo.precompute_ref_log_probs=true": "",
}
_GPU = "it needs a GPU"
_LONG = "it takes minutes"
_CLUSTER = "it needs a cluster"
_REPOSITORY = "it needs a git repository with that revision"
_SAME = "it is long, and a command like it runs"
# Commands that do not run here, with the reason. Their flags, options and sweep files are checked.
CHECKED = {
    "rlhfbench run": _SAME,
    "rlhfbench report before after": "it needs two runs, and tests of the command line compare two",
    "rlhfbench run --model ./my-checkpoint --prompts my.jsonl --seq-lens 512 --dtype bfloat16 --device cuda": _GPU,
    "rlhfbench run --model opt-1.3b --setting paper,modern --dtype bfloat16 --device cuda": _GPU,
    "rlhfbench run --methods dpo --model gpt2 --option dpo.beta=0.2 --option engine.gradient_checkpointing=true": _LONG,
    "rlhfbench run --methods hydra --seq-lens 64 --batch-sizes 2 --with-plan --profile": _SAME,
    "rlhfbench run --methods lora,hydra --seq-lens 128 --max-batch --memory-limit 24GiB": _LONG,
    "rlhfbench run --methods lora,hydra --seq-lens 128 --max-batch --memory-limit 4GiB": _LONG,
    "rlhfbench run --methods hydra --option ppo.kl_coef=0.05 --option lora.target_modules=q_proj,v_proj": _SAME,
    "rlhfbench run --methods hydra --prompts prompts.jsonl --seq-lens 64": _SAME,
    "rlhfbench run --methods sft,sft-lora --demonstrations demonstrations.jsonl --seq-lens 64": _SAME,
    "rlhfbench run --methods dpo,dpo-lora --pairs pairs.jsonl --seq-lens 64": _SAME,
    "rlhfbench run --methods sft-lora --demonstrations demonstrations.jsonl --option sft.packing=true "
    "--seq-lens 64": _SAME,
    "rlhfbench run --methods dpo-lora,hydra --seq-lens 32 --batch-sizes 2 --world-size 1,2 --parallel ddp "
    "--out my-ranks": _SAME,
    "rlhfbench run --methods hydra,lora,full,dpo --seq-lens 32 --batch-sizes 2 --world-size 2 "
    "--parallel ddp,fsdp,deepspeed --zero-stage 0,1,2,3 --out my-stages": _LONG,
    "rlhfbench run --methods hydra,lora,full,dpo --seq-lens 32 --batch-sizes 2 --world-size 2 "
    "--parallel ddp,fsdp,deepspeed --zero-stage 0,1,2,3 --option parallel.reduce_bucket_size=1000000 --blocks 2": _LONG,
    "rlhfbench run --sweep sweep.toml": _LONG,
    "rlhfbench run --sweep sweep.toml --batch-sizes 8 --option lora.r=64": _LONG,
    "rlhfbench run --sweep cases.toml": _SAME,
    "rlhfbench run --sweep gather.toml": _SAME,
    "rlhfbench run --model opt-1.3b --device cuda --ray 10.0.0.1:6379": _CLUSTER,
    "rlhfbench run --methods ppo,dpo --seq-lens 128,256 --ray 10.0.0.1:6379 --ray-group size --out my-run": _CLUSTER,
    "rlhfbench plan --sweep sweep.toml --gpu 24GiB": _LONG,
    "rlhfbench plan --model llama-7b --seq-lens 800 --batch-sizes 1,4 --dtype bfloat16 --gpu a100-80gb "
    "--out my-plan": _LONG,
    "rlhfbench plan --model llama-2-70b --seq-lens 800 --batch-sizes 1 --dtype bfloat16 --gpu h200 --zero-stage 3 "
    "--world-size 8": _LONG,
    "rlhfbench plan --model tiny --device cpu --methods lora,dpo-lora --seq-lens 64 --batch-sizes 2 --json": _SAME,
    "rlhfbench plan --model tiny --device cpu --methods hydra,full --seq-lens 64 --batch-sizes 2 --parallel fsdp "
    "--world-size 2": _SAME,
    "rlhfbench plan --model tiny --device cpu --methods hydra --seq-lens 64 --batch-sizes 2 --zero-stage 1,2 "
    "--world-size 2,8": _SAME,
    "rlhfbench run --methods full,hydra --seq-lens 32 --batch-sizes 2 --world-size 1,2,4 --zero-stage 1 "
    "--option parallel.reduce_bucket_size=1000000 --out my-scaling": _LONG,
    "rlhfbench plan --device cpu --methods full,hydra --seq-lens 32 --batch-sizes 2 --world-size 1,2,4,8 "
    "--zero-stage 1 --option parallel.reduce_bucket_size=1000000 --out my-plan": _SAME,
    "rlhfbench report my-scaling my-plan": "it needs the run before it",
    "rlhfbench plan --device cpu --methods full,hydra --seq-lens 32 --batch-sizes 2 --world-size 2,8 "
    "--zero-stage 1,2 --option parallel.reduce_bucket_size=1000000": _SAME,
    "rlhfbench evidence --out my-evidence": _GPU,
    "rlhfbench evidence --out cpu-evidence --device cpu --model tiny --budget-min 4": _LONG,
    "rlhfbench evidence --out my-evidence --parts 3,5": _GPU,
    "rlhfbench evidence --out my-blocks --parts 3 --blocks 4": _GPU,
    "rlhfbench gate --base main": _REPOSITORY,
    "rlhfbench gate --self-test --seq-lens 32 --batch-sizes 2": _LONG,
    "rlhfbench gate --bisect v1.2 HEAD --methods hydra": _REPOSITORY,
    "rlhfbench gate --base main --step bench_step:make_step --methods full --seq-lens 32 --batch-sizes 4": _REPOSITORY,
    "rlhfbench run --methods lora,hydra --seq-lens 32 --batch-sizes 2 --out baseline": _SAME,
    "rlhfbench watch my-run": "it serves until Ctrl-C",
    "rlhfbench gate --baseline baseline --memory-only": _SAME,
}
# Parts of commands that install packages, or are the run that this test is part of.
INSTALL = (["python3", "-m", "venv"], [".venv/bin/pip", "install"], [".venv/bin/python", "-m", "pytest", "-q"])

_BLOCK = re.compile(r'^```(\w*)(?: title="([^"]+)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    """A fenced block: its language, its title, its text, and the line that it begins on."""

    language: str
    title: str
    text: str
    line: int


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page."""
    text = page.read_text(encoding="utf-8")
    return [Block(*found.groups(default=""), text.count("\n", 0, found.start()) + 2) for found in _BLOCK.finditer(text)]


def commands(block: Block) -> Iterator[list[str]]:
    """The commands of a ``sh`` block, split into words."""
    for line in block.text.replace("\\\n", " ").splitlines():
        for command in line.split("&&"):
            words = shlex.split(command, comments=True)
            if words:
                yield [Path(words[0]).name if words[0].endswith("rlhfbench") else words[0], *words[1:]]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_code_of_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = page.read_text(encoding="utf-8")
    if "my-run" in text and "--out my-run" not in text:
        # Without its timelines, whose figures take most of the time of a report.
        shutil.copytree(RESULTS / "default-cpu", "my-run", ignore=shutil.ignore_patterns("timelines"))
    found = blocks(page)
    for i, block in enumerate(found):
        if block.title:
            Path(block.title).write_text(block.text, encoding="utf-8")
        if block.language == "python":
            printed = _run_python(page, block)
            if i + 1 < len(found) and not found[i + 1].language and page.stem == "ledger":
                assert printed == found[i + 1].text
        elif block.language == "sh":
            for words in commands(block):
                _check(words)


def _run_python(page: Path, block: Block) -> str:
    # Line numbers of errors are those of the page.
    code = compile("\n" * (block.line - 1) + block.text, str(page), "exec")
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(code, {"__name__": "__main__"})
    return out.getvalue()


def _check(words: list[str]) -> None:
    command = shlex.join(words)
    if words[0] == "pytest":
        _check_pytest(words[1:])
    elif words[0] == "mkdocs" or any(words[: len(part)] == part for part in INSTALL):
        return
    elif command in RUN:
        assert invoke([*words[1:], *RUN[command].split()]) == 0
        # A case that fails is an outcome: the command's exit code is 0 then too.
        records = [record for run in Path().glob("*/records.jsonl") for record in read_records(run.parent)]
        assert {record["outcome"] for record in records} <= {"ok"}
    else:
        assert command in CHECKED, "add the command to RUN, or to CHECKED with the reason"
        _check_flags(words[1:])


def _check_flags(words: list[str]) -> None:
    """Parses a command and makes its sweep or request, which checks every flag, option and value."""
    verb, *arguments = words
    params = typer.main.get_command(app).commands[verb].make_context(verb, list(arguments)).params
    if verb == "report":
        assert params["run_dirs"]
        return
    if verb == "evidence":
        assert Request.of(params["model"], params["device"], params["blocks"])
        assert parse_parts(params["parts"], PARTS)
        return
    if "methods" not in params:  # a verb that reads a run
        return
    cases = CaseOptions(**{field.name: params[field.name] for field in dataclasses.fields(CaseOptions)})
    assert make_sweep(cases.spec(), cases.sweep, cases.setting).cases


def _check_pytest(words: list[str]) -> None:
    """Collects the tests. Of a path in the repository, only the words after ``-k`` are looked up."""
    if not words[0].startswith("-"):
        files = [ROOT / words[0]] if words[0].endswith(".py") else list((ROOT / words[0]).rglob("*.py"))
        keyword = words[words.index("-k") + 1]
        assert any(re.search(rf"def \w*{keyword}", path.read_text(encoding="utf-8")) for path in files)
        return
    command = [sys.executable, "-m", "pytest", *words, "--collect-only", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "rlhfbench::" in done.stdout


def test_every_listed_command_is_on_a_page() -> None:
    found = {
        shlex.join(words)
        for page in PAGES
        for block in blocks(page)
        if block.language == "sh"
        for words in commands(block)
    }
    assert not {*RUN, *CHECKED} - found


def rows(text: str) -> list[list[str]]:
    """The cells of a Markdown table, heading included, rule left out."""
    lines = [line for line in text.splitlines() if line.startswith("|") and not set(line) <= set("|-: ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def between(page: Path, marker: str) -> str:
    """The text between two comments ``<!-- marker -->``."""
    _, text, _ = page.read_text(encoding="utf-8").split(f"<!-- {marker} -->\n")
    return text


def test_the_results_of_the_readme_are_those_of_the_kept_run() -> None:
    head, *kept = rows((RESULTS / "default-cpu" / "memory_table.md").read_text(encoding="utf-8"))
    wanted = [row for row in kept if row[head.index("length")] == "128" and row[head.index("batch")] == "4"]
    assert len(wanted) == 5
    assert rows(between(ROOT / "README.md", "results")) == [head, *wanted]


def test_the_plan_of_the_readme_is_the_kept_one() -> None:
    plans = json.loads((RESULTS / "plan-llama-7b" / "plan.json").read_text(encoding="utf-8"))
    wanted = [_plan_row(plan) for plan in plans if plan["case"]["batch_size"] == 4]
    _, *found = rows(between(ROOT / "README.md", "plan"))
    assert len(found) == 2
    assert all(row in wanted for row in found)


def _plan_row(plan: dict[str, Any]) -> list[str]:
    case = plan["case"]
    length, batch = case["prompt_len"] + case["completion_len"], case["batch_size"]
    total = f"{plan['memory']['total_bytes'] / 2**30:.2f}"
    fits = "yes" if plan["fits"] else "no"
    return [METHODS[case["method"]].title, str(length), str(batch), total, fits, str(plan["max_batch_size"])]


def test_the_gain_on_the_results_page_is_that_of_the_kept_run() -> None:
    kept = rows((RESULTS / "settings-cpu" / "gain.md").read_text(encoding="utf-8"))
    assert len(kept) > 1
    assert rows(between(ROOT / "docs" / "results.md", "gain")) == kept


def test_the_changelog_lists_every_renamed_option() -> None:
    listed = rows((ROOT / "CHANGELOG.md").read_text(encoding="utf-8"))[1:]
    assert {old.strip("`"): new.strip("`") for old, new in listed} == RENAMED_OPTIONS


def test_the_methods_page_lists_every_method() -> None:
    page = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    listed = {row[0].strip("`"): row[1:4] for row in rows(page.partition("## ")[0])[1:]}
    wanted = {}
    for name, method in METHODS.items():
        models, sets = method.num_static_models, len(method.adapter_sets)
        loads = f"{models} model{'s' * (models > 1)}" + (f", {sets} LoRA set{'s' * (sets > 1)}" if sets else "")
        wanted[name] = [method.title, method.family, loads]
    assert listed == wanted


def test_the_methods_page_shows_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    invoke(["methods"])
    printed = capsys.readouterr().out
    (block,) = (block for block in blocks(ROOT / "docs" / "methods.md") if not block.language)
    assert block.text in printed
