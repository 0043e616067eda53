"""``rlhfbench run`` over several ranks, with fake cases."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rlhfbench.cases import preflight
from rlhfbench.cases.ranks import MAX_RANKS_PER_CORE, check_ranks
from rlhfbench.cases.sweep import Sweep
from rlhfbench.cli.ranks import RankOptions, make_ranked_sweep
from rlhfbench.errors import SweepError
from rlhfbench.launch import Launch
from rlhfbench.network import free_port
from rlhfbench.processes import num_cores
from rlhfbench.runs import runner
from rlhfbench.runs.follower import Follower
from rlhfkernels.config.case import Case
from rlhfkernels.config.options import Options

HERE = Path(__file__).parents[1]
SPEC = {"methods": ["dpo"], "seq_lens": [8], "batch_sizes": [4]}


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)


def ranked(spec=SPEC, launched=None, **params):
    sweep = make_ranked_sweep(spec, None, None, RankOptions(**params), launched=launched)
    return [(case.batch_size, case.rows_per_step, case.options.parallel) for case in sweep.cases]


def test_without_a_flag_a_case_has_no_ranks():
    ((_, rows, parallel),) = ranked()
    assert (rows, parallel.strategy, parallel.world_size) == (4, None, 1)


def test_every_world_size_is_a_case_of_data_parallel_ranks():
    found = ranked(world_size="1,2,2,4")
    assert [(rows, p.strategy, p.world_size) for _, rows, p in found] == [(4, "ddp", 1), (8, "ddp", 2), (16, "ddp", 4)]


def test_a_global_batch_is_divided_among_the_ranks():
    found = ranked(world_size="1,2,4", global_batch=True)
    assert [(batch_size, rows) for batch_size, rows, _ in found] == [(4, 4), (2, 4), (1, 4)]


def test_flags_and_options_add_up():
    spec = {**SPEC, "options": {"parallel.gather": "rollout", "parallel.zero_stage": 3, "lora.r": 2}}
    ((_, _, parallel),) = ranked(spec, world_size="2", parallel="deepspeed", zero_stage="3")
    assert (parallel.strategy, parallel.zero_stage, parallel.gather) == ("deepspeed", 3, "rollout")


@pytest.mark.parametrize(
    ("name", "value", "flags", "says"),
    [
        ("world_size", 4, {"world_size": "2"}, "--world-size is 2 and --option parallel.world_size is 4"),
        ("world_size", 2, {"world_size": "1,2"}, "--world-size is [1, 2] and --option parallel.world_size is 2"),
        ("zero_stage", 3, {"world_size": "2", "zero_stage": "1"}, "--zero-stage is 1 and --option parallel.zero_stage"),
        ("strategy", "fsdp", {"world_size": "2", "parallel": "ddp"}, "--parallel is 'ddp' and --option parallel.strat"),
    ],
)
def test_a_flag_and_an_option_that_contradict_each_other_are_refused(name, value, flags, says):
    with pytest.raises(SweepError) as error:
        ranked({**SPEC, "options": {f"parallel.{name}": value}}, **flags)
    (problem,) = error.value.problems
    assert problem.startswith(says)
    assert problem.endswith(": give one of the two.")


def test_strategies_and_stages_are_cases_and_stages_are_of_deepspeed_alone():
    found = ranked(world_size="2,4", parallel="ddp,deepspeed,fsdp", zero_stage="0,3")
    kinds = [("ddp", 0), ("deepspeed", 0), ("deepspeed", 3), ("fsdp", 0)]
    assert sorted((p.strategy, p.zero_stage, p.world_size) for _, _, p in found) == sorted(
        (*kind, size) for kind in kinds for size in (2, 4)
    )


def test_a_stage_alone_is_deepspeed_s():
    found = ranked(world_size="2", zero_stage="1,2")
    assert [(p.strategy, p.zero_stage) for _, _, p in found] == [("deepspeed", 1), ("deepspeed", 2)]


def test_a_file_says_how_ranks_share_where_flags_do_not(tmp_path):
    file = tmp_path / "sweep.toml"
    file.write_text('methods = ["dpo"]\nseq_lens = [8]\nbatch_sizes = [1]\n[options.parallel]\nstrategy = "fsdp"\n')

    def of_file(**params):
        sweep = make_ranked_sweep({}, str(file), None, RankOptions(**params))
        return sorted((case.options.parallel.strategy, case.options.parallel.world_size) for case in sweep.cases)

    assert of_file(world_size="2") == [("fsdp", 2)]
    assert of_file(world_size="2", parallel="ddp") == [("ddp", 2)]
    file.write_text(file.read_text() + "world_size = [1, 2]\n")
    assert of_file() == [("fsdp", 1), ("fsdp", 2)]
    assert of_file(parallel="ddp,fsdp") == [("ddp", 1), ("ddp", 2), ("fsdp", 1), ("fsdp", 2)]


def test_a_file_without_ranks_stays_without(tmp_path):
    file = tmp_path / "sweep.toml"
    file.write_text('methods = ["dpo"]\nseq_lens = [8]\nbatch_sizes = [1]\n')
    (case,) = make_ranked_sweep({}, str(file), None, RankOptions()).cases
    assert case.options.parallel.strategy is None
    with pytest.raises(SweepError, match=r"^--parallel is 'ddp': it needs --world-size N\.$"):
        make_ranked_sweep({}, str(file), None, RankOptions(parallel="ddp"))


def test_a_launcher_gives_the_world_size():
    ((_, _, parallel),) = ranked(parallel="fsdp", launched=3)
    assert (parallel.strategy, parallel.world_size) == ("fsdp", 3)
    ((_, _, parallel),) = ranked(world_size="2", launched=3)
    assert (parallel.strategy, parallel.world_size) == ("ddp", 2)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--world-size", "0"), "--world-size has 0: every value must be an integer of at least 1."),
        (("--world-size", "x"), "--world-size has 'x': it must list integers, joined by commas."),
        (("--world-size", "9999"), "world-size is 9999: on the CPU of this machine, it must be at most"),
        (("--parallel", "ddp"), "--parallel is 'ddp': it needs --world-size N."),
        (("--zero-stage", "1"), "--zero-stage is 1: it needs --world-size N."),
        (("--world-size", "2", "--parallel", "dp"), "parallel.strategy 'dp' is unknown: did you mean 'ddp'"),
        (("--world-size", "2", "--parallel", "ddp", "--zero-stage", "1"), "parallel.zero_stage is 1: ZeRO is DeepS"),
        (
            ("--world-size", "2", "--zero-stage", "4"),
            "parallel.zero_stage is 4: it must be an integer from 0 to 3.",
        ),
        (("--world-size", "2", "--zero-stage", "0,x"), "--zero-stage has 'x': it must list integers, joined by"),
        (
            ("--world-size", "2", "--global-batch", "--batch-sizes", "3"),
            "batch_sizes has 3: with --global-batch it must be a multiple of world-size 2.",
        ),
    ],
)
def test_a_mistake_is_one_sentence_and_starts_nothing(call, tmp_path, arguments, says):
    code, out, err = call("run", "--methods", "dpo", *arguments)
    assert (code, out) == (2, "")
    assert says in err
    assert len(err.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def case(size, device):
    options = Options.of({"parallel.strategy": "ddp", "parallel.world_size": size})
    sizes = {"prompt_len": 4, "completion_len": 4, "batch_size": 1}
    return Case(method="dpo", model="tiny", device=device, options=options, **sizes)


def test_more_ranks_than_devices(monkeypatch):
    limit = MAX_RANKS_PER_CORE * num_cores()
    cases = [case(limit, "cpu"), case(limit + 1, "cpu"), case(2, "cuda"), case(3, "cuda"), case(2, "cuda:0")]
    assert list(check_ranks(cases, lambda: 2)) == [
        f"world-size is {limit + 1}: on the CPU of this machine, it must be at most {limit}, four ranks a core.",
        "world-size is 3: this machine has 2 CUDA devices.",
        "device is 'cuda:0': every rank takes the device of its own number, so it must be 'cuda'.",
    ]
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert list(check_ranks(cases[3:4], lambda: 2)) == [
        "world-size is 3: the launcher started 2 processes, one for each rank."
    ]


def test_more_ranks_of_a_launcher_than_devices_of_a_machine(monkeypatch):
    ranks = (case(2, "cuda"), case(4, "cuda"), case(4, "cpu"))
    for name, value in {"RANK": "0", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    assert list(check_ranks(ranks, lambda: 2)) == [
        "world-size is 4: 4 of its ranks are on this machine, so each process must see 4 CUDA devices, and this one "
        "sees 2."
    ]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")  # the other two are on another machine
    assert list(check_ranks(ranks, lambda: 2)) == []


def test_the_devices_of_a_cluster_are_not_those_of_this_machine():
    preflight.check(Sweep(cases=(case(9999, "cpu"),)), devices=False)


def test_a_sweep_of_a_script_starts_the_ranks_of_another_process(tmp_path, monkeypatch):
    followed = []
    monkeypatch.setattr(runner, "follow_launcher", lambda: followed.append(True))
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    result = runner.run_sweep(Sweep(cases=(case(2, "cpu"),)), tmp_path / "run")
    assert (result.records, result.interrupted, followed) == ([], False, [True])
    assert not (tmp_path / "run").exists()


def test_torchrun_starts_the_ranks_of_two_machines(tmp_path):
    """Two agents of torchrun on the loopback, each with two processes."""
    agent = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "2"]
    agent += [
        "--rdzv-backend",
        "c10d",
        "--rdzv-endpoint",
        f"localhost:{free_port()}",
        "--local-addr",
        "localhost",
    ]
    command = [*agent, HERE / "fake_case.py", "", "run", "--out", tmp_path / "run", "--blocks", "1", "--json"]
    command += ["--methods", "dpo", "--seq-lens", "8", "--batch-sizes", "1", "--option", "data.prompt_field=echo"]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for _ in range(2)]
    said = [process.communicate(timeout=240)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0], said
    (line,) = (tmp_path / "run" / "records.jsonl").read_text().splitlines()
    record = json.loads(line)
    assert record["case"]["options"]["parallel"]["world_size"] == 4
    rank = record["prompts"]["rank"]
    assert (rank["rank"], rank["size"], rank["local_rank"], rank["local_size"]) == (0, 4, 0, 2)


def test_two_processes_of_a_launcher_make_one_run(tmp_path, monkeypatch):
    """As torchrun starts them on two machines: rank 0 makes the run, and the other ends with it."""
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    command = [sys.executable, HERE / "fake_case.py", "", "run", "--out", tmp_path / "run", "--blocks", "1", "--json"]
    command += ["--methods", "dpo", "--seq-lens", "8", "--batch-sizes", "1", "--option", "data.prompt_field=echo"]
    started = [
        subprocess.Popen(
            command,
            env={**os.environ, "RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    (out, err), (other_out, other_err) = [process.communicate(timeout=120) for process in started]
    assert [process.returncode for process in started] == [0, 0], err + other_err
    assert (other_out, other_err) == ("", "")
    (record,) = json.loads(out[out.index("[{") :])
    assert record["outcome"] == "ok"
    rank = record["prompts"]["rank"]
    assert (rank["rank"], rank["size"], rank["local_rank"], rank["local_size"]) == (0, 2, 0, 1)
    assert rank["address"].startswith("tcp://127.0.0.1:")


def test_the_others_end_when_rank_0_refuses_the_command(tmp_path, monkeypatch):
    """They wait for it, and hear of the end."""
    port = free_port()
    monkeypatch.setenv("MASTER_PORT", str(port))
    environment = {**os.environ, "RANK": "0", "WORLD_SIZE": "2"}
    command = [sys.executable, HERE / "fake_case.py", "", "run", "--out", tmp_path / "run", "--methods", "no"]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as head:
        launch = Launch(rank=1, size=2, local_rank=0, local_size=1, host="127.0.0.1", port=port)
        Follower(launch).follow(None)
        assert head.wait(30) == 2
