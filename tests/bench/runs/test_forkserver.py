import os
import select
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from rlhfbench.errors import ForkServerError
from rlhfbench.runs.faults import last_line
from rlhfbench.runs.forkserver import ForkServer, worker_environment
from rlhfbench.runs.forkserver_process import Lines
from rlhfbench.runs.job import finish

HERE = Path(__file__).parents[1]


pytestmark = pytest.mark.usefixtures("fake_case_path")


@pytest.fixture
def server(request):
    """A fork server of fake cases; a test may name modules that it imports first."""
    with ForkServer(target="fake_case:run_case", preload=getattr(request, "param", ())) as server:
        yield server


@pytest.fixture
def run(server, tmp_path):
    """Runs one fake case; returns (exit, messages, log)."""

    def run(kind, *, timeout_s=60.0, on_message=lambda message: None, **request):
        messages = []

        def take(message):
            messages.append(message)
            on_message(message)

        log = tmp_path / "log"
        log.unlink(missing_ok=True)
        request = {"case": {"options": {"data": {"prompt_field": kind}}}, **request}
        end = server.run(request, log_path=log, timeout_s=timeout_s, on_message=take)
        return end, messages, log.read_text()

    return run


def test_a_case_gets_its_request_and_its_messages_come_in_order(run):
    end, messages, log = run("echo", more=[1, "é"])
    assert (end.code, end.timed_out, log) == (0, False, "")
    assert messages[:2] == [{"notify": "build"}, {"notify": "phase:score"}]
    assert messages[2]["result"]["prompts"]["more"] == [1, "é"]
    assert end.pid not in (None, os.getpid())
    assert end.max_rss_bytes > 2**20


def test_a_server_outlives_the_thread_that_started_it(server, run):
    """A server that died during a pair of a gate is started again by the pair's thread."""
    server.close()
    thread = threading.Thread(target=server.start)
    thread.start()
    task = Path(f"/proc/self/task/{thread.native_id}")
    thread.join()
    while task.exists():  # the kernel ends the thread, and kills what is to die with it, a moment later
        os.sched_yield()
    pid = server.pid
    end, _, _ = run("echo")
    assert (end.code, server.pid) == (0, pid)


def test_a_job_may_have_more_processes_than_one_message_has_descriptors_for(server, tmp_path):
    """Four ranks a core are more than 100 on a machine of 32 cores."""
    results = {}
    request = {"case": {"options": {"data": {"prompt_field": "echo"}}}, "preload": ()}
    requests = [{**request, "number": number} for number in range(130)]

    def take(number, message):
        if "result" in message:
            results[number] = message["result"]["prompts"]["number"]

    with server.job(requests, [tmp_path / f"{number}.log" for number in range(130)], take) as job:
        finish(job, None)
    assert {end.code for end in job.exits} == {0}
    assert results == {number: number for number in range(130)}


def test_a_job_has_several_processes_each_with_its_messages_log_and_exit(server, tmp_path, is_gone):
    kinds = ("chatter", "exit", "hang")
    requests = [{"case": {"options": {"data": {"prompt_field": kind}}}, "preload": ["colorsys"]} for kind in kinds]
    logs = [tmp_path / f"{kind}.log" for kind in kinds]
    results, stages = {}, []

    def take(number, message):
        if "result" in message:
            results[number] = message["result"]["outcome"]
        elif number == 2:
            stages.append(message["notify"].split()[0])

    with server.job(requests, logs, take) as job:
        while None in job.exits[:2] or "hanging" not in stages:
            job.wait(60)
        assert not job.is_over
        job.dump()  # who runs writes its stack
        until_s = time.monotonic() + 60
        while "in _hang" not in logs[2].read_text() and time.monotonic() < until_s:
            job.wait(0.05)
        assert job.kill()
        finish(job, None)
    assert [end.code for end in job.exits] == [0, 7, -signal.SIGKILL]
    assert [end.pid for end in job.exits] == job.pids
    assert len(set(job.pids)) == 3
    assert results == {0: "ok"}
    assert logs[0].read_text() == "said on stdout\n"
    assert logs[1].read_text() == "before the end\n"
    assert "in _hang" in logs[2].read_text()
    assert is_gone(job.pids[2])


def test_a_phase_is_told_with_the_exit_and_wakes_no_one(server, tmp_path):
    request = {"case": {"options": {"data": {"prompt_field": "in-a-phase"}}}}
    told = []
    end = server.run(request, log_path=tmp_path / "log", on_message=told.append)
    assert (end.code, end.phase) == (-signal.SIGKILL, "optimize")
    assert told == [{"notify": "build"}, {"notify": "phase:score"}]


def test_each_case_is_a_fresh_process_of_the_same_server(run, server):
    ends = [run("state") for _ in range(3)]
    assert len({end.pid for end, _, _ in ends}) == 3
    assert {messages[-1]["result"]["prompts"]["parent"] for _, messages, _ in ends} == {server.pid}
    assert all(messages[-1]["result"]["prompts"]["defaults"] == [True, True] for _, messages, _ in ends)


def test_messages_larger_than_a_pipe_and_a_log(run):
    end, messages, log = run("chatter")
    assert end.code == 0
    assert sum(len(m.get("notify", "")) > 65536 for m in messages) == 3
    assert messages[-1]["result"]["outcome"] == "ok"
    assert log == "said on stdout\n"


def test_the_last_message_arrives_even_if_the_exit_status_arrives_first(run, server, monkeypatch, tmp_path):
    os.mkfifo(tmp_path / "fifo")
    receive = server.receive

    def receive_to_the_end():
        heard = receive()
        (tmp_path / "fifo").write_text("")
        while not any("exit" in message for message in heard):
            heard += receive()
        return heard

    monkeypatch.setattr(server, "receive", receive_to_the_end)
    end, messages, _ = run("wait", fifo=str(tmp_path / "fifo"))
    assert end.code == 0
    assert messages[-1]["result"]["outcome"] == "ok"


def test_a_crash_is_an_exit_with_its_signal_and_the_next_case_runs(run):
    end, messages, log = run("segfault")
    assert end.code == -signal.SIGSEGV
    assert messages[-1] == {"notify": "phase:score"}
    assert "Segmentation fault" in log
    assert run("exit")[0].code == 7
    assert run("die")[0].code == -signal.SIGKILL
    assert run("ok")[0].code == 0


def test_a_case_that_raises_past_its_target_exits_with_1_and_a_traceback(run):
    end, _, log = run("no such behaviour")
    assert end.code == 1
    assert "KeyError" in log


def test_an_incomplete_line_is_no_message(run):
    lines = Lines()
    assert lines.feed(b'{"a": 1}\n{"b"') == [{"a": 1}]
    assert lines.feed(b": 2}\n") == [{"b": 2}]
    assert lines.feed(b'{"torn') == []


def test_a_case_that_takes_too_long_is_killed_with_all_it_started(run, is_gone):
    pids = []
    end, messages, _ = run("hang-with-helper", timeout_s=5)
    assert end.timed_out
    assert end.code == -signal.SIGKILL
    pids = [int(m["notify"].split()[1]) for m in messages if m["notify"].startswith(("helped", "hanging"))]
    assert len(pids) == 2
    assert all(is_gone(pid) for pid in pids)
    assert run("ok")[0].code == 0


@pytest.mark.parametrize("server", [("without_waitid",)], indirect=True)
def test_a_system_without_waitid_gets_the_same_exits(run, is_gone):
    """Python has it on macOS from 3.13 on."""
    assert [run(kind)[0].code for kind in ("ok", "exit", "die")] == [0, 7, -signal.SIGKILL]
    end, messages, _ = run("hang-with-helper", timeout_s=5)
    assert (end.code, end.timed_out) == (-signal.SIGKILL, True)
    assert end.max_rss_bytes > 2**20
    pids = [int(m["notify"].split()[1]) for m in messages if m["notify"].startswith(("helped", "hanging"))]
    assert len(pids) == 2
    assert all(is_gone(pid) for pid in pids)


def test_a_case_killed_from_outside(run):
    def kill(message):
        if message["notify"].startswith("hanging"):
            os.kill(int(message["notify"].split()[1]), signal.SIGKILL)

    end, _, _ = run("hang", on_message=kill)
    assert (end.code, end.timed_out) == (-signal.SIGKILL, False)


def test_a_server_that_dies_ends_its_case_and_is_started_again(run, server, is_gone):
    seen = []

    def kill_server(message):
        if message["notify"].startswith("hanging"):
            seen[:] = [int(word) for word in message["notify"].split()[1:]]
            os.kill(seen[1], signal.SIGKILL)

    end, _, _ = run("hang", on_message=kill_server)
    assert (end.code, end.max_rss_bytes, end.timed_out) == (None, None, False)
    assert seen[1] != server.pid
    assert is_gone(seen[0])
    assert run("ok")[0].code == 0


def test_an_interrupt_ends_the_case_and_the_server(run, server, is_gone):
    pids = []

    def interrupt(message):
        if message["notify"].startswith("hanging"):
            pids[:] = [int(word) for word in message["notify"].split()[1:]]
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run("hang", on_message=interrupt)
    assert len(pids) == 2
    assert all(is_gone(pid) for pid in pids)
    assert server.pid is None


def test_a_server_that_another_thread_kills_leaves_nothing_that_its_case_started(run, server, is_gone):
    """As Ctrl-C does in a gate, whose sides run in threads."""
    pids = []

    def kill(message):
        if message["notify"].startswith(("helped", "hanging")):
            pids.append(int(message["notify"].split()[1]))
        if len(pids) == 2:
            server.kill()

    end, _, _ = run("hang-with-helper", on_message=kill)
    assert end.code != 0
    assert len(pids) == 2
    assert all(is_gone(pid) for pid in pids)


def test_closing_ends_the_server(is_gone):
    server = ForkServer(target="fake_case:run_case", preload=())
    server.start()
    pid = server.pid
    assert pid is not None
    server.close()
    assert is_gone(pid)
    server.close()


def test_a_server_that_cannot_start_says_why():
    with pytest.raises(ForkServerError, match="did not start: ModuleNotFoundError: No module named 'no_such_module'"):
        ForkServer(target="fake_case:run_case", preload=("no_such_module",)).start()


def test_optional_modules_may_be_missing():
    with ForkServer(target="fake_case:run_case", preload=(), optional=("no_such_module",)) as server:
        assert server.pid is not None


def start_harness(out, *arguments, preload=""):
    return subprocess.Popen(
        [sys.executable, HERE / "fake_case.py", preload, "run", "--out", out, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_until_hanging(harness):
    """The pids of the case and of the server, once the case hangs."""
    for line in harness.stdout:
        if line.startswith("hanging"):
            return [int(word) for word in line.split()[1:]]
    raise AssertionError(harness.stderr.read())


HANG = ("--methods", "hydra", "--seq-lens", "8", "--batch-sizes", "1", "--option", "data.prompt_field=hang")


def test_a_harness_killed_with_kill_9_leaves_nothing_behind(tmp_path, is_gone):
    with start_harness(tmp_path / "run", *HANG) as harness:
        pids = wait_until_hanging(harness)
        harness.kill()
        assert all(is_gone(pid) for pid in pids)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere no signal tells the server of its parent's death")
def test_a_harness_killed_with_kill_9_leaves_no_file_of_its_ranks_behind(tmp_path, monkeypatch, is_gone):
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    with start_harness(tmp_path / "run", *HANG, "--world-size", "2") as harness:
        pids = wait_until_hanging(harness)
        assert list(folder.iterdir())
        harness.kill()
        assert all(is_gone(pid) for pid in pids)
    assert not list(folder.iterdir())


def test_a_folder_lasts_as_long_as_its_block_and_no_longer_than_the_server(server, is_gone):
    with server.scratch() as folder:
        assert folder.is_dir()
    assert not folder.exists()
    with server.scratch() as folder:
        (folder / "file").touch()
        pid = server.pid
        os.kill(pid, signal.SIGTERM)
        assert is_gone(pid)
        assert not folder.exists()


def test_a_harness_killed_while_its_server_imports_leaves_nothing_behind(
    tmp_path, monkeypatch, fake_case_path, is_gone
):
    os.mkfifo(tmp_path / "pid")
    (tmp_path / "slow_to_import.py").write_text(
        "import os, time\n"
        f"with open({str(tmp_path / 'pid')!r}, 'w') as f:\n"
        "    f.write(str(os.getpid()))\n"
        "time.sleep(600)\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{fake_case_path}")
    with start_harness(tmp_path / "run", *HANG, preload="slow_to_import") as harness:
        with open(tmp_path / "pid", opener=lambda path, flags: os.open(path, flags | os.O_NONBLOCK)) as pid:
            assert select.select([pid], [], [], 60)[0], "the server did not import the module"
            server = int(pid.read())
        harness.kill()
        assert is_gone(server)


def test_a_script_without_a_main_guard_is_not_started_over(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "from pathlib import Path\n"
        "from rlhfbench.runs.forkserver import ForkServer\n"
        "print('once')\n"
        "with ForkServer(target='fake_case:run_case', preload=()) as server:\n"
        "    request = {'case': {'options': {'data': {'prompt_field': 'ok'}}}}\n"
        f"    print(server.run(request, log_path=Path({str(tmp_path / 'log')!r})).code)\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.split() == ["once", "0"]


def test_the_last_line_that_is_not_blank():
    assert last_line("a\n  b \n\n \n") == "b"
    assert last_line("") == ""
    assert len(last_line("x" * 1000)) == 300


def test_idle_threads_of_a_case_spin_briefly_unless_the_user_says_otherwise():
    assert worker_environment({"HOME": "/h"}) == {"HOME": "/h", "GOMP_SPINCOUNT": "1000"}
    assert worker_environment({"OMP_WAIT_POLICY": "active"}) == {"OMP_WAIT_POLICY": "active"}
    assert worker_environment({"GOMP_SPINCOUNT": "5"}) == {"GOMP_SPINCOUNT": "5"}
