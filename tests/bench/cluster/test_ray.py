"""Runs on a Ray cluster of three nodes on this machine. The tests share it, and the last ones kill nodes."""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from rlhfbench.cases.sweep import Sweep
from rlhfbench.cluster.place import Cluster
from rlhfbench.errors import SweepError
from rlhfbench.records.file import read_records
from rlhfbench.runs.options import RunOptions
from rlhfbench.runs.runner import run_sweep

pytest.importorskip("ray")

FAKE_SERVER = {"target": "fake_case:run_case", "preload": ()}
# The command line with fake cases, which need no memory.
DRIVER = (
    "from rlhfbench.cluster import needs; needs._planned_bytes = lambda *_: {}; "
    f"from rlhfbench.cluster.place import Cluster; Cluster.server_arguments = {FAKE_SERVER!r}; "
    "from rlhfbench.cli.main import main; main()"
)


@pytest.fixture(autouse=True)
def fake_cases(monkeypatch, nodes):
    monkeypatch.setattr(Cluster, "server_arguments", FAKE_SERVER)
    # Planning is the planner's; here each case needs nothing.
    monkeypatch.setattr("rlhfbench.cluster.needs._planned_bytes", lambda *_: {})


def run(sweep, out, nodes, told, group="case", *, resume=False, **options):
    with Cluster(nodes.address, group) as cluster:
        return run_sweep(sweep, out, RunOptions(**options), progress=told, place=cluster, resume=resume)


def test_every_outcome_and_its_files_come_back_from_the_nodes(tmp_path, nodes, told, sweep_of, fake):
    kinds = ("ok", "blocks", "chatter", "segfault", "over-limit", "hang", "timeline")
    sweep = Sweep(cases=(*sweep_of(*kinds).cases, fake("ok", device="cuda")))
    out = tmp_path / "run"
    result = run(sweep, out, nodes, told, case_timeout_s=5, memory_limit_bytes=2**27, blocks=2, with_plan=True)
    by_kind = {(r["case"]["options"]["data"]["prompt_field"], r["case"]["device"]): r for r in read_records(out)}
    outcomes = {kind: record["outcome"] for kind, record in by_kind.items()}
    assert outcomes == {
        **{(kind, "cpu"): "ok" for kind in ("ok", "blocks", "chatter", "timeline")},
        ("segfault", "cpu"): "crashed",
        ("over-limit", "cpu"): "oom",
        ("hang", "cpu"): "timeout",
        ("ok", "cuda"): "invalid",
    }
    assert len(result.records) == len(sweep.cases)
    hosts = {record["run"]["host"] for record in result.records if record["outcome"] != "invalid"}
    assert len(hosts) > 1
    environment = json.loads((out / "environment.json").read_text())
    assert {name.rpartition("/")[2] for name in environment["nodes"]} == {"n1", "n2", "n3"}
    assert hosts <= set(environment["nodes"])
    assert all(node["cpu"]["num_usable_cores"] for node in environment["nodes"].values())
    assert environment["settings"]["ray"] == nodes.address
    blocks = by_kind["blocks", "cpu"]["latency"]["blocks"]
    assert [block["phases"]["generate"] for block in blocks] == [[1.0], [2.0]]
    assert by_kind["ok", "cpu"]["plan"]["total_bytes"] == 7
    logs = {path.stem: path.read_text() for path in (out / "logs").iterdir()}
    assert "said on stdout" in logs[by_kind["chatter", "cpu"]["case"]["id"]]
    assert "Segmentation fault" in logs[by_kind["segfault", "cpu"]["case"]["id"]]
    assert (out / "timelines" / f"{by_kind['timeline', 'cpu']['case']['id']}.json").is_file()
    said = by_kind["ok", "cuda"]["error"]["message"]
    assert said.startswith("no node can hold it: it needs 1 CUDA device, and 3 nodes have up to 1 core, ")
    assert said.endswith(" GiB, no GPU.")


def test_a_run_starts_a_cluster_of_this_machine(tmp_path, sweep_of):
    out, sweep_file = tmp_path / "run", tmp_path / "sweep.toml"
    sweep_file.write_text(sweep_of("ok", "segfault").to_toml())
    flags = ["--sweep", str(sweep_file), "--ray", "local", "--out", str(out)]
    done = subprocess.run([sys.executable, "-c", DRIVER, "run", *flags], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    records = read_records(out)
    assert [record["outcome"] for record in records] == ["ok", "crashed"]
    environment = json.loads((out / "environment.json").read_text())
    assert environment["settings"]["ray"] == "local"
    assert {record["run"]["host"] for record in records} == set(environment["nodes"])
    assert len(environment["nodes"]) == 1


def test_an_ended_driver_leaves_no_process_and_its_run_is_resumed(tmp_path, nodes, told, sweep_of, is_gone):
    sweep = sweep_of("ok", "chatter", "hang-first")
    out, sweep_file = tmp_path / "run", tmp_path / "sweep.toml"
    sweep_file.write_text(sweep.to_toml())
    flags = ["--sweep", str(sweep_file), "--ray", nodes.address, "--out", str(out)]
    before = ""
    for number, code in ((signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)):
        fifo = Path(os.environ["FAKE_CASE_FIFO"])
        os.mkfifo(fifo)
        driver = subprocess.Popen([sys.executable, "-c", DRIVER, "run", *flags], stderr=subprocess.PIPE, text=True)
        with fifo.open() as pipe:
            case = int(pipe.read())
        driver.send_signal(number)
        said = driver.communicate()[1]
        assert driver.returncode == code
        assert (f"To resume: rlhfbench run --resume {out}" in said) == (code == 130)
        assert is_gone(case)
        after = (out / "records.jsonl").read_text()
        assert after.startswith(before)
        before, flags = after, ["--resume", str(out)]
    run(sweep, out, nodes, told, "sweep", resume=True)
    after = (out / "records.jsonl").read_text()
    assert after.startswith(before)
    ids = [json.loads(line)["case"]["id"] for line in after.splitlines()]
    assert sorted(ids) == sorted(case.id for case in sweep.cases)


def test_a_node_with_another_version_is_one_sentence(tmp_path, nodes, told, sweep_of):
    other = tmp_path / "other"
    for package in ("rlhfbench", "rlhfkernels"):
        (other / package).mkdir(parents=True)
        (other / package / "__init__.py").touch()
    (other / "rlhfbench-9.9.dist-info").mkdir()
    (other / "rlhfbench-9.9.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: rlhfbench\nVersion: 9.9\n"
    )
    node = nodes.add("old", env_vars={"PYTHONPATH": str(other)})
    nodes.wait()
    try:
        with pytest.raises(
            SweepError, match=r"node \S*/old has rlhfbench 9\.9 and this machine rlhfbench \S+: install"
        ):
            run(sweep_of("ok"), tmp_path / "run", nodes, told)
    finally:
        nodes.kill(node)
    assert not (tmp_path / "run").exists()


def test_the_cases_of_a_killed_node_run_elsewhere(tmp_path, nodes, told, sweep_of):
    sweep = sweep_of("hang-first", "ok", "chatter")
    fifo = Path(os.environ["FAKE_CASE_FIFO"])
    os.mkfifo(fifo)
    killed = []

    def kill():
        with fifo.open() as pipe:
            killed.append(nodes.name_of(int(pipe.read())))
        nodes.kill_named(killed[0])

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    result = run(sweep, tmp_path / "run", nodes, told, "sweep")
    thread.join()
    assert [record["outcome"] for record in result.records] == ["ok"] * 3
    ran_on = {record["case"]["id"]: record["run"]["host"].rpartition("/")[2] for record in result.records}
    assert killed[0] not in ran_on.values()
    assert len(set(ran_on.values())) == 1
    assert f"/{killed[0]} was lost" in told.text
