import datetime
import importlib.metadata
import json
import os
import platform
import subprocess

import pytest

from rlhfbench.runs import environment, versions


def git(folder, *arguments):
    identity = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", "-C", folder, *identity, *arguments], check=True, capture_output=True)


def test_the_environment_is_complete_and_survives_json():
    found = environment.describe(argv=["rlhfbench", "run"], settings={"num_threads": 3})
    assert json.loads(json.dumps(found)) == found
    assert found["argv"] == ["rlhfbench", "run"]
    assert found["python"] == platform.python_version()
    optional = {"deepspeed", "bitsandbytes", "liger-kernel", "flash-attn"}
    needed = {"torch", "transformers", "peft", "numpy", "triton"}
    assert set(found["versions"]) == {"rlhfbench", *needed, *optional}
    # A source tree that is not installed has no version of its own.
    assert all(found["versions"][name] for name in needed)
    assert found["num_threads"] == 3
    assert found["launched_ranks"] == "none"
    assert found["source"]["hash"] == versions.installed()[1]
    assert found["cpu"]["num_usable_cores"] == len(os.sched_getaffinity(0))
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert found["cpu"]["memory_bytes"] == pages
    assert datetime.datetime.fromisoformat(found["started_at"]).tzinfo is not None


def test_the_versions_of_libraries_that_take_over_steps_are_compared(monkeypatch):
    def version(name):
        if name != "flash-attn":
            raise importlib.metadata.PackageNotFoundError(name)
        return "2.8"

    monkeypatch.setattr(importlib.metadata, "version", version)
    found = environment.package_versions()
    assert {name: number for name, number in found.items() if number is not None} == {"flash-attn": "2.8"}
    before = {**found, "flash-attn": "2.7", "liger-kernel": None}
    assert environment.differences({"versions": found}, [{"versions": before}]) == ["flash-attn 2.8 instead of 2.7"]
    assert environment.differences({"versions": found}, [{"versions": {}}]) == []  # of an earlier version


def test_the_threads_are_the_usable_cores_unless_they_are_set():
    found = environment.describe(argv=[], settings={"num_threads": None})
    assert found["num_threads"] == len(os.sched_getaffinity(0))


def test_variables_load_and_revisions_are_kept(monkeypatch):
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    monkeypatch.setenv("MALLOC_ARENA_MAX", "2")
    monkeypatch.setenv("TORCH_CUDNN_SDPA_DEPRIORITIZED", "1")
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    others = {"LD_PRELOAD": "", "ATEN_CPU_CAPABILITY": "avx2", "DNNL_VERBOSE": "0", "ONEDNN_VERBOSE": "0"}
    others |= {"NCCL_ALGO": "Ring"}
    for name, value in others.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("HF_TOKEN", "hidden")
    found = environment.describe(argv=[], settings={}, revisions={"org/name": "abc"})
    assert found["variables"].items() >= {
        "OMP_WAIT_POLICY": "passive", "CUDA_VISIBLE_DEVICES": "1", "MALLOC_ARENA_MAX": "2",
        "TORCH_CUDNN_SDPA_DEPRIORITIZED": "1", "CUBLAS_WORKSPACE_CONFIG": ":16:8",
    }.items()  # fmt: skip
    assert found["variables"].items() >= others.items()
    assert not found["variables"].keys() & {"HF_TOKEN", "PATH", "HOME"}
    assert "hidden" not in json.dumps(found)
    assert all(load >= 0 for load in found["load_average"])
    assert len(found["load_average"]) == 3
    assert found["revisions"] == {"org/name": "abc"}


HERE = {"host": "a", "num_threads": 2, "python": "3.12.1", "versions": {"torch": "2.11"}, "source": {"commit": "abc"}}


@pytest.mark.parametrize(
    ("now", "earlier", "says"),
    [
        ({}, [{}], None),
        ({"started_at": 1}, [{}], None),
        ({"host": "b", "num_threads": 1}, [{}], "host b instead of a; threads 1 instead of 2."),
        ({"versions": {"torch": "2.12"}}, [{}, {"versions": {"torch": "2.10"}}], "torch 2.12 instead of 2.11, 2.10."),
        ({}, [{}, {"source": {"commit": "old"}}], "commit abc instead of old."),
        ({"source": {"commit": None}}, [{}], "commit unknown instead of abc."),
        ({"source": {"commit": "abc"}}, [{"source": {"commit": None}}], None),
        ({"gpus": [{"name": "H100"}]}, [{"gpus": [{"name": "T4"}] * 2}], "GPUs H100 instead of T4 + T4."),
        (
            {"gpus": [{"name": "T4", "driver": "2"}]},
            [{"gpus": [{"name": "T4", "driver": "1"}]}],
            "GPUs T4 (driver 2) instead of T4 (driver 1).",
        ),
        (
            {"source": {"commit": "abc", "dirty": True, "hash": "b"}},
            [{"source": {"commit": "abc", "dirty": True, "hash": "a"}}],
            "sources b instead of a.",
        ),
        ({"variables": {"OMP_NUM_THREADS": "2"}}, [{"variables": {}}], "variables OMP_NUM_THREADS=2 instead of none."),
        ({"revisions": {"m": "b"}}, [{"revisions": {"m": "a"}}], "revisions m=b instead of m=a."),
        ({"launched_ranks": "8 here"}, [{"launched_ranks": "none"}], "launcher's ranks 8 here instead of none."),
        ({"launched_ranks": "8 here"}, [{}], None),  # of an earlier version
        ({}, [{"host": 3, "gpus": [1], "versions": []}], "host a instead of 3; GPUs unknown instead of None."),
    ],
)
def test_the_changes_since_earlier_segments_are_one_sentence(now, earlier, says):
    found = environment.changes({**HERE, **now}, [{**HERE, **segment} for segment in earlier])
    if says is None:
        assert found is None
    else:
        assert found == f"Resumed under other conditions: {says} Times before and after do not compare."


@pytest.mark.parametrize(
    ("now", "earlier", "expected"),
    [
        ({}, {}, True),
        ({"num_threads": 1}, {}, False),
        ({"source": {"commit": "b", "hash": "x"}}, {"source": {"commit": "a", "hash": "x"}}, True),
        ({"source": {"commit": "a", "hash": "y"}}, {"source": {"commit": "a", "hash": "x"}}, False),
        ({"source": {"commit": "b", "hash": "x"}}, {"source": {"commit": "a"}}, False),
    ],
)
def test_environments_are_alike_where_times_compare(now, earlier, expected):
    assert environment.are_alike({**HERE, **now}, {**HERE, **earlier}) is expected


@pytest.mark.parametrize(
    ("nodes", "expected"),
    [({}, "driver"), ({"nodes": {"a": {"host": "node"}}}, "node"), ({"nodes": {"b": {"host": "node"}}}, "driver")],
)
def test_the_environment_of_a_host_is_that_of_the_node_where_there_is_one(nodes, expected):
    assert environment.of_host({"host": "driver", **nodes}, "a")["host"] == expected


def test_the_commit_of_a_checkout_and_whether_it_is_dirty(tmp_path):
    assert environment.source(tmp_path) == {"commit": None, "dirty": None}
    git(tmp_path, "init")
    (tmp_path / "__init__.py").touch()
    assert environment.source(tmp_path) == {"commit": None, "dirty": None}  # in a checkout, and no part of it
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "one")
    clean = environment.source(tmp_path)
    assert len(clean["commit"]) == 40
    assert clean["dirty"] is False
    (tmp_path / "new").touch()
    assert environment.source(tmp_path) == {**clean, "dirty": True}
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").touch()
    git(tmp_path, "add", "package")
    git(tmp_path, "commit", "-m", "two")
    assert environment.source(tmp_path / "package")["dirty"] is False  # what changed lies beside it
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "new").touch()
    assert environment.source(tmp_path / "package", tmp_path / "other")["dirty"] is True


def test_a_module_that_was_run_is_a_command_that_can_be_run_again():
    found = environment.describe(argv=["/some/where/rlhfbench/__main__.py", "run"], settings={})
    assert found["argv"] == ["python", "-m", "rlhfbench", "run"]


def test_without_git_there_is_no_commit(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert environment.source(tmp_path) == {"commit": None, "dirty": None}


class FakeNvml:
    class NVMLError(Exception):
        pass

    NVMLError_NoPermission = NVMLError

    def nvmlInit(self):  # noqa: N802
        self.open = True

    def nvmlShutdown(self):  # noqa: N802
        self.open = False

    def nvmlSystemGetDriverVersion(self):  # noqa: N802
        return b"570.1"

    def nvmlDeviceGetCount(self):  # noqa: N802
        return 2

    def nvmlDeviceGetHandleByIndex(self, index):  # noqa: N802
        return index

    def nvmlDeviceGetMigDeviceHandleByIndex(self, handle, index):  # noqa: N802
        raise self.NVMLError

    def nvmlDeviceGetName(self, handle):  # noqa: N802
        return f"GPU {handle}"

    def nvmlDeviceGetMemoryInfo(self, handle):  # noqa: N802
        return type("Info", (), {"total": 2**33})


def test_gpus_are_listed_by_nvml(monkeypatch):
    nvml = FakeNvml()
    monkeypatch.setitem(__import__("sys").modules, "pynvml", nvml)
    assert environment.gpus() == [
        {"name": "GPU 0", "driver": "570.1", "memory_bytes": 2**33},
        {"name": "GPU 1", "driver": "570.1", "memory_bytes": 2**33},
    ]
    assert nvml.open is False


def test_gpus_are_those_that_cuda_sees_in_its_order(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pynvml", FakeNvml())
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,0")
    assert [gpu["name"] for gpu in environment.gpus()] == ["GPU 1", "GPU 0"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert [gpu["name"] for gpu in environment.gpus()] == ["GPU 1"]


def test_without_nvml_gpus_are_unknown(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pynvml", None)
    assert environment.gpus() is None
