"""Hostile command lines, sweeps, models and records: one sentence and an exit code, never a traceback.

Everything but the cases themselves runs: parsing, checks, the folder of a run, reading of records and tables.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import itertools
import json
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import typer.main
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import rlhfreports
from rlhfbench.cases import model_facts, preflight
from rlhfbench.cases.sweep import Sweep
from rlhfbench.cli import main as cli
from rlhfbench.cli import plan_output
from rlhfbench.errors import SweepError
from rlhfbench.evidence import collect
from rlhfbench.gate import bisect, compare, selftest, sides
from rlhfbench.gate.sides import Side
from rlhfbench.planning import plans
from rlhfbench.planning.predict import plan_case
from rlhfbench.records.file import make_record
from rlhfbench.records.schema import FIELDS
from rlhfbench.runs import environment, max_batch, runner
from rlhfbench.runs.case_process import ThisMachine
from rlhfbench.runs.case_runner import Runner
from rlhfbench.runs.execution import Ended
from rlhfkernels.config.case import Case, option_annotations
from rlhfkernels.engine import verify as engine_verify
from rlhfkernels.errors import CaseError, ModelError
from rlhfkernels.models.configuration import read_config
from rlhfkernels.ops.native import build
from rlhfreports import gain, plots, predicted_plot, slope_table, timelines
from rlhfreports.page import sections
from rlhfreports.page.configuration import configuration_section
from rlhfreports.page.summary import answer_section

NUMBERS = [
    "0", "-1", "1", "2", "0.5", "1e999", "-inf", "inf", "nan", "1e308", "9" * 400, "-" + "9" * 400, "9" * 5000,
    str(2**31), str(2**63 - 1), str(2**63), str(2**64), str(2**200), "1e-320", "0x10", "1_000", "٣", "²", "", " ",
    "4,,8",
    "8,16", "x", "-0", "+1", "1e3",
]  # fmt: skip
SIZES = [
    "4GiB",
    "1KiB",
    "0",
    "0.0001",
    "9" * 400 + "TiB",
    "9" * 5000,
    "-1GiB",
    "1e5",
    "٣GiB",
    "much",
    "",
    "1 GiB",
    "1B",
]
TEXTS = [
    "", " ", "tiny", "gpt2", "hydra", "all", "ppo,", "lora,hydra", "cuda:999", "cuda:٣", "cpu", "float32",
    "paper,paper",
    "modern", "none", "\udcff", "a\udcff/b", "ü", "\x1b[31m", "x" * 300, "x" * 5000, "/", ".", "..", "~", "~nobody/x",
    "/dev/null", "a\nb", "--", "-", "%s", "{}", "[red]", "org/name/x", "./\udc80", "good.jsonl", "bom.jsonl",
    "bad.jsonl",
    "a100-80gb", "ok,ok", "crashed", "crashed,oom", "old", "new", "file", "sweep.toml",
]  # fmt: skip
NUMERIC = [
    "--seq-lens", "--batch-sizes", "--prompt-fraction", "--seed", "--lora-rank", "--time-budget-s", "--case-timeout-s",
    "--threads", "--max-batch-limit", "--zero-stage", "--world-size",
]  # fmt: skip
TEXTUAL = [
    "--model", "--methods", "--setting", "--prompts", "--prompt-field", "--demonstrations", "--pairs", "--device",
    "--dtype", "--out", "--resume", "--retry", "--sweep",
]  # fmt: skip
OTHERS = {
    "gate": [
        "--base",
        "--baseline",
        "--step",
        "--smallest-effect",
        "--promised-effect",
        "--budget-s",
        "--summary",
        "--out",
        "--model",
        "--device",
        "--threads",
    ],
    "evidence": ["--budget-min", "--model", "--device", "--parts", "--blocks", "--out"],
    "verify": ["--model", "--device", "--dtype"],
}
GATED = [[], ["--base", "main"], ["--self-test"], ["--bisect", "a", "b"], ["--baseline", "old"], ["--baseline", "file"],
         ["--baseline", "stored", "--update-baseline"]]  # fmt: skip
NO_ANSWERS = selftest.SelfTest(
    num_cases=0,
    num_quantities=0,
    not_measured=[],
    false_alarms=[],
    num_held_found=0,
    slowed=[],
    rates=[],
    promised=None,
)
SWITCHES = [
    "--profile",
    "--no-profile",
    "--with-plan",
    "--max-batch",
    "--json",
    "--global-batch",
    "--unknown",
    "--help",
]
OPTIONS = [*option_annotations(), "gamma", "x.y", "lora", ""]
COUNTER = itertools.count()


def fuzz(max_examples: int) -> settings:
    """Settings of a test: the same examples every time."""
    return settings(
        max_examples=max_examples,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )


class NoServer:
    """A fork server that forks nothing."""

    start_s = 0.0

    def start(self) -> None:
        """Does nothing."""

    def close(self) -> None:
        """Does nothing."""


def measured(case: Case) -> dict[str, Any]:
    """A record of ``case`` with values in every section."""
    memory = {f"{name}_bytes": 1 for name in ("model", "activation", "rollout", "total")}
    block = {"phases": {"generate": [1.0, 1.0]}, "stopped_because": "budget", "floors_s": {"generate": 0.5}}
    latency = {"phases": {"generate": {"kind": "inference"}}, "num_blocks": 1}
    sections = {"memory": {**memory, "parts": {"base": 1}, "phases": {}}, "latency": latency, "block": block}
    sections |= {"work": {"phases": {"generate": {"flops": 1, "bytes": 1}}}, "stats": {"loss": 1.0}}
    return make_record(case, outcome="ok", error=None, measured=sections, started_at="2026-01-01", wall_s=1.0)


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with good and bad files, in which nothing is measured, planned or drawn."""
    path = tmp_path_factory.mktemp("fuzz")
    (path / "good.jsonl").write_text('{"prompt": "hello"}\n')
    (path / "bom.jsonl").write_text('\ufeff{"prompt": "hello"}\n')
    (path / "bad.jsonl").write_bytes(b'{"prompt": "\xff"}\n')
    (path / "file").write_bytes(b"\0\xff")
    (path / "sweep.toml").write_text('methods = ["hydra"]\nseq_lens = [8]\nbatch_sizes = [1]\n')
    (path / "old").mkdir()
    (path / "old" / "sweep.toml").write_text("seq_lens = [8]\n")
    (path / "old" / "environment.json").write_text('{"settings": 3, "resumed": []}')
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        patch.setattr(runner, "make_server", lambda models: NoServer())
        patch.setattr(Runner, "_record", lambda self, ended: measured(ended.task.case))
        patch.setattr(ThisMachine, "run_task", lambda self, task: Ended(task=task, result={}, started_at="2026-01-01"))
        patch.setattr(plans, "plan_kinds", lambda *_, **__: [])
        patch.setattr(max_batch, "_planned", lambda *_: None)
        patch.setattr(plan_output, "table", lambda *_: "")
        patch.setattr(plan_output, "write", lambda *_: None)
        patch.setattr(environment, "describe", lambda settings, **_: {"settings": settings})
        patch.setattr(os, "fsync", lambda fd: None)
        patch.setattr(model_facts, "_is_hub_reachable", lambda: False)
        patch.setattr(preflight, "library_path", build._SOURCES.absolute)
        for module, name in ((plots, "latency"), (plots, "throughput"), (predicted_plot, "draw_predicted")):
            patch.setattr(module, name, lambda *_: None)
        patch.setattr(timelines, "draw_timeline", lambda *_, **__: None)
        # typer builds all verbs for each command, 20 ms of the 35 that an example takes.
        patch.setattr(typer.main, "get_command", functools.cache(typer.main.get_command))
        without_work(patch)
        yield path


def without_work(patch: pytest.MonkeyPatch) -> None:
    """Has ``verify``, ``gate`` and ``evidence`` measure nothing, and the gate ask git for nothing."""
    side = Side(name="head", title="this", paths=())
    part = {"outcome": "done", "wall_s": 1.0, "error": None}
    patch.setattr(engine_verify, "verify", lambda model, **_: [])
    patch.setattr(collect, "_run_part", lambda *_: part)
    patch.setattr(collect, "report", lambda *_: "")
    patch.setattr(sides, "only_gate", contextlib.nullcontext)
    patch.setattr(sides, "repository", Path.cwd)
    patch.setattr(sides, "head_side", lambda *_, **__: side)
    patch.setattr(sides, "checked_out", lambda *_, **__: contextlib.nullcontext(side))
    patch.setattr(sides, "module_roots", lambda *_, **__: [])
    patch.setattr(compare.Comparison, "run", lambda self: [])
    patch.setattr(selftest, "self_test", lambda *_, **__: NO_ANSWERS)
    patch.setattr(bisect, "commits_between", lambda *_, **__: [])
    patch.setattr(bisect, "bisect", lambda *_, **__: bisect.Tested(commit="abc", subject="a commit", findings=[]))


@pytest.fixture
def without_charts(folder: Path) -> Iterator[None]:
    """Fits no slopes and draws no charts: a page takes 0.3 s, and the records of these runs are alike."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sections, "SECTIONS", (answer_section, configuration_section))
        patch.setattr(rlhfreports, "slope_table", lambda frame: slope_table(frame.head(1)))
        patch.setattr(gain, "has_gain", lambda frame: False)
        yield


def check(*arguments: str) -> None:
    """Runs the command: a known exit code, and one sentence for a mistake. An exception fails the test."""
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="strict") for _ in range(2))
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.invoke(list(arguments))
    err.flush()
    text = err.buffer.getvalue().decode()
    assert code in (0, 1, 2, 3), (arguments, code)
    assert "Traceback" not in text
    if code == 2:
        assert text.strip(), arguments
        assert all(len(line) < 3000 for line in text.splitlines()), arguments


def flag() -> st.SearchStrategy[list[str]]:
    """A flag with a value, mostly hostile."""
    values = st.sampled_from([*NUMBERS, *SIZES, *TEXTS])
    return st.one_of(
        st.tuples(st.sampled_from(NUMERIC), st.sampled_from(NUMBERS)).map(list),
        st.tuples(st.sampled_from(TEXTUAL), st.sampled_from(TEXTS)).map(list),
        st.tuples(st.sampled_from(["--memory-limit", "--gpu"]), st.sampled_from(SIZES)).map(list),
        st.tuples(st.sampled_from(OPTIONS), values).map(lambda pair: ["--option", "=".join(pair)]),
        st.sampled_from(SWITCHES).map(lambda name: [name]),
        values.map(lambda value: [value]),
    )


SMALL = ["--methods", "hydra", "--seq-lens", "8", "--batch-sizes", "1"]


@pytest.mark.usefixtures("without_charts")
@fuzz(1000)
@given(
    st.sampled_from(["run", "run", "plan", "report", "methods", "models"]), st.lists(flag(), max_size=3), st.booleans()
)
def test_command_lines(verb: str, flags: list[list[str]], small: bool) -> None:
    words = [word for flag in flags for word in flag]
    if verb == "run" and not {"--out", "--resume"} & set(words):
        words += ["--out", f"run-{next(COUNTER)}"]
    check(verb, *(SMALL if small and verb in ("run", "plan") else []), *words)


def other_flags(verb: str) -> st.SearchStrategy[list[str]]:
    """Flags of ``verb``, ``gate`` and so on, mostly hostile."""
    values = st.sampled_from([*NUMBERS, *TEXTS])
    one = st.one_of(
        st.tuples(st.sampled_from(OTHERS[verb]), values).map(list),
        st.sampled_from(["--json", "--unknown", "--memory-only", "--update-baseline"]).map(lambda name: [name]),
    )
    start = st.sampled_from(GATED if verb == "gate" else [["--out", "evidence", "--device", "cpu"], []])
    flags = st.tuples(start if verb != "verify" else st.just(["--model", "tiny"]), st.lists(one, max_size=2))
    return flags.map(lambda found: [verb, *found[0], *(word for each in found[1] for word in each)])


@fuzz(300)
@given(st.sampled_from(list(OTHERS)).flatmap(other_flags))
def test_command_lines_of_the_other_verbs(words: list[str]) -> None:
    check(*words)


SHAPE = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
         "num_attention_heads": 2, "vocab_size": 64}  # fmt: skip
FIELDS_OF_MODELS = [
    *SHAPE, "num_key_value_heads", "head_dim", "hidden_act", "rope_parameters", "rope_scaling", "layer_types",
    "max_position_embeddings", "sliding_window", "tie_word_embeddings", "pad_token_id", "quantization_config", "dtype",
    "final_logit_softcapping", "logits_scaling", "text_config", "auto_map", "rms_norm_eps",
]  # fmt: skip
HOSTILE = [
    None, True, 0, 1, -1, 3, 2**31, 2**63, 10**30, 1.5, float("inf"), float("nan"), "", "x", "gpt2", "yarn", "\0",
    [], [3], ["full_attention"], [[]], {}, {"a": 3}, {"rope_type": "yarn"}, {"rope_type": "linear", "factor": 0},
    {"quant_method": "bitsandbytes"},
]  # fmt: skip
EMPTY = b'{"a": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}'
WEIGHTS = [
    b"", bytes(range(20)), b"\xff" * 20, len(EMPTY).to_bytes(8, "little") + EMPTY, (2).to_bytes(8, "little") + b"{}"
]  # fmt: skip


@fuzz(150)
@given(
    st.dictionaries(st.sampled_from(FIELDS_OF_MODELS), st.sampled_from(HOSTILE), max_size=2), st.sampled_from(WEIGHTS)
)
def test_model_folders(change: dict[str, Any], weights: bytes) -> None:
    """Whatever a checkpoint holds, a plan of it succeeds or ends in one sentence. Nothing of it is stubbed."""
    Path("fuzzed").mkdir(exist_ok=True)
    Path("fuzzed/config.json").write_text(json.dumps(SHAPE | change))
    Path("fuzzed/model.safetensors").write_bytes(weights)
    grid = {"models": ["./fuzzed"], "methods": ["sft-lora"], "seq_lens": [8], "batch_sizes": [1]}
    sweep, sentence = Sweep.from_spec(grid), ""
    with contextlib.suppress(SweepError):
        preflight.check(sweep)
    try:
        preflight.check_models(sweep)
        plan_case(sweep.cases[0])
    except (SweepError, ModelError, CaseError) as error:
        sentence = str(error)
    assert len(sentence.splitlines()) <= 1


@fuzz(100)
@given(st.binary(max_size=80), st.integers(0, 3), st.integers(0, 3), st.integers(0, 3))
def test_gguf_files(content: bytes, version: int, num_tensors: int, num_values: int) -> None:
    Path("fuzzed.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", version, num_tensors, num_values) + content)
    check("plan", "--model", "./fuzzed.gguf", *SMALL)
    with contextlib.suppress(ModelError):
        read_config("./fuzzed.gguf")


KEYS = st.sampled_from(
    [
        *[
            "methods",
            "method",
            "models",
            "model",
            "seq_lens",
            "prompt_lens",
            "completion_len",
            "batch_sizes",
            "device",
            "dtype",
            "seed",
        ],
        *["prompt_fraction", "options", "settings", "setting", "cases", "x", "lora", "ppo", "data", "lora.r", "r"],
    ]
)
LEAVES = st.one_of(
    st.sampled_from(["tiny", "hydra", "none", "", "\0", "a\0b", "x" * 300, "paper", "cpu"]),
    st.sampled_from([0, 1, 8, -1, 2**31, 2**63, 10**400, 1.5, float("nan"), float("inf"), True, 4, [], {}]),
)
VALUES = st.recursive(
    LEAVES, lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(KEYS, inner, max_size=3)), max_leaves=6
)
RAW = [
    "cases = 3", "[[cases]]\noptions = 4", "[[cases]]\n", "cases = [3]", "x = " + "[" * 3000,
    "x = " + "[" * 400 + "]" * 400,
    "options." + ".".join("a" * 300) + " = 1", "seed = " + "9" * 5000, "seed = 9223372036854775808", "a = 1\na = 2",
    "options = {data = {prompts = 3}}", "\x00", "methods = 'hydra'\n[options.lora]\nr = nan",
    "[[cases]]\nmethod='hydra'\nmodel='tiny'\nseq_len=8\nbatch_size=1\noptions=4", "settings = [[3]]",
    "prompt_fraction = nan",
    "seq_lens = [" + "9" * 400 + "]", "x = {" + "a = {" * 400 + "}" * 401,
]  # fmt: skip


@pytest.mark.usefixtures("without_charts")
@fuzz(500)
@given(
    st.one_of(st.sampled_from(RAW), st.dictionaries(KEYS, VALUES, max_size=5).map(tomli_w.dumps)),
    st.lists(flag(), max_size=1),
)
def test_sweeps(text: str, flags: list[list[str]]) -> None:
    Path("fuzzed.toml").write_text(text, encoding="utf-8")
    words = [word for flag in flags for word in flag if word not in ("--out", "--resume")]
    check("run", "--sweep", "fuzzed.toml", *words, "--out", f"run-{next(COUNTER)}")


RECORD = measured(Case(method="hydra", model="tiny", prompt_len=4, completion_len=4, batch_size=1))
PATHS = sorted(
    {".".join(path.split(".")[:end]) for row in FIELDS for path in [str(row.source)] if isinstance(row.source, str)
     for end in range(1, path.count(".") + 2)}
    | {"schema", "case.options.lora", "latency.phases.generate", "outcome"}
    | {"latency.blocks.0", "latency.blocks.0.phases.generate", "latency.phases.generate.kind"}
    | {f"latency.blocks.0.{key}" for key in ("stopped_because", "phases", "error", "interference", "floors_s")}
    | {"latency.phases.generate.mean_s", "memory.phases.generate", "memory.phases.generate.total_bytes"}
)  # fmt: skip
WRONG = st.one_of(
    st.sampled_from(
        [None, True, 0, 3, -1, 2**63, 10**400, 1.5, 1e308, "x", "", "\ud800", "../x", [], [3], {}, {"a": 3}, [[]]]
    ),
    st.sampled_from([1, 2, 3, "ok", "oom", "skipped", float("nan"), {"generate": 3}, {"generate": {"samples_s": 3}}]),
)


def replaced(record: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """``record`` with another value at a dotted path, as far as the path exists."""
    *folders, key = path.split(".")
    node: Any = record
    for name in folders:
        if isinstance(node, list) and node:
            node = node[0]
            continue
        if not isinstance(node, dict):
            return record
        if not isinstance(node.get(name), (dict, list)):
            node[name] = {}
        node = node[name]
    if isinstance(node, dict):
        node[key] = value
    elif isinstance(node, list) and node:
        node[0] = value
    return record


CASE_ID = RECORD["case"]["id"].encode()
RAW_RECORDS = [
    b"[" * 100_000, b'{"schema": 2, "case": ' + b"[" * 5000 + b"]" * 5000 + b"}", b'{"schema": 99}', b"{}", b"null",
    b"\xff",
    b'{"schema": ' + b"9" * 5000 + b"}", b'{"schema": 2, "case": {"id": null}, "outcome": "ok"}', b'{"schema": 2}',
    b'{"schema": 1, "case": {"id": "a", "options": 3}, "outcome": "ok"}', b"\xef\xbb\xbf{}", b"x",
    b'{"schema": 1, "case": {"id": "a", "options": {"lora_scaling": "x"}, "lora_rank": "y"}, "outcome": "ok"}',
    b'{"schema": 2, "block_of": 3, "block": {}}', b'{"schema": 2, "block_of": "a", "run": 3, "block": {"phases": []}}',
    b'{"schema": 2, "block_of": "a", "block": {"phases": {"x": [1]}, "stopped_because": "budget"}}',
    b'{"schema": 2, "block_of": "%b", "block": {"phases": {"x": [1]}, "stopped_because": "budget"}}' % CASE_ID,
    b'{"schema": 2, "block_of": "%b", "block": {"error": {"outcome": "oom"}}}' % CASE_ID,
    b'{"schema": 2, "case": {"id": "a"}, "outcome": {}}', b'{"schema": true, "case": {"id": "a"}, "outcome": "ok"}',
]  # fmt: skip


CHANGED = st.lists(st.tuples(st.sampled_from(PATHS), WRONG), min_size=1, max_size=3).map(
    lambda changes: json.dumps(_changed(changes)).encode()
)


@pytest.mark.usefixtures("without_charts")
@fuzz(500)
@given(st.one_of(st.sampled_from(RAW_RECORDS), CHANGED))
def test_records(line: bytes) -> None:
    report(line)


@fuzz(100)
@given(CHANGED)
def test_charts_of_records(line: bytes) -> None:
    report(line)


def report(line: bytes) -> None:
    """Reports a good record and ``line``."""
    Path("recorded").mkdir(exist_ok=True)
    Path("recorded/records.jsonl").write_bytes(json.dumps(RECORD).encode() + b"\n" + line + b"\n")
    check("report", "recorded")


def _changed(changes: list[tuple[str, Any]]) -> dict[str, Any]:
    record = copy.deepcopy(RECORD)
    for path, value in changes:
        replaced(record, path, copy.deepcopy(value))
    return record
