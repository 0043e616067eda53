"""Wrong flags of a run on a cluster: one sentence each, and nothing is written."""

import importlib.util
import json

import pytest

from rlhfbench.cli.main import invoke
from rlhfbench.cluster.place import Cluster
from rlhfbench.errors import SweepError


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--ray", "cluster"], "--ray is 'cluster': it must be local, or HOST:PORT of the head of a Ray cluster."),
        (["--ray", "127.0.0.1:1"], "--ray is '127.0.0.1:1': no Ray cluster answers there."),
        (["--ray-group", "size"], "--ray-group is 'size': it needs --ray ADDRESS."),
        (
            ["--ray", "local", "--ray-group", "sizes"],
            "--ray-group 'sizes' is unknown: did you mean 'size'? Valid: sweep, model, size, case.",
        ),
        (
            ["--ray", "local", "--max-batch"],
            "--ray is 'local': --max-batch tries one batch after the other, on this machine alone.",
        ),
        (
            ["--ray", "local", "--device", "cuda:1"],
            "device 'cuda:1': on a cluster a case takes any free device: name 'cuda'.",
        ),
    ],
)
def test_a_wrong_flag_is_one_sentence(tmp_path, capsys, flags, said):
    assert invoke(["run", "--out", str(tmp_path / "run"), *flags]) == 2
    assert capsys.readouterr().err == said + "\n"
    assert not (tmp_path / "run").exists()


def test_ray_that_is_missing_is_one_sentence(tmp_path, capsys, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: None if name == "ray" else find_spec(name))
    assert invoke(["run", "--out", str(tmp_path / "run"), "--ray", "local"]) == 2
    said = capsys.readouterr().err
    assert said == "--ray is 'local': it needs ray, which is not installed (pip install 'rlhfbench[ray]').\n"


def test_a_run_is_resumed_on_its_cluster_unless_told_otherwise(tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    (run / "sweep.toml").write_text('methods = ["hydra"]\nmodel = "tiny"\nseq_lens = [8]\nbatch_sizes = [1]\n')
    settings = {"ray": "127.0.0.1:1", "ray_group": "size"}
    (run / "environment.json").write_text(json.dumps({"settings": settings, "resumed": []}))
    assert invoke(["run", "--resume", str(run)]) == 2
    assert capsys.readouterr().err == "--ray is '127.0.0.1:1': no Ray cluster answers there.\n"
    assert invoke(["run", "--resume", str(run), "--ray", "none", "--ray-group", "size"]) == 2
    assert capsys.readouterr().err == "--ray-group is 'size': it needs --ray ADDRESS.\n"


def test_a_launcher_of_several_processes_is_refused(tmp_path, monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SweepError, match=r"^--ray is 'local': a launcher started 2 processes, and Ray is used by one"):
        Cluster("local")
