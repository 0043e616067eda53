"""Fake cases: each behaves as its ``data.prompt_field`` says. As a program: the command line with fake cases."""

import functools
import os
import signal
import sys
import time
from pathlib import Path

from rlhfbench.measure.turns import Turns
from rlhfbench.runs import runner, worker
from rlhfbench.runs.forkserver import ForkServer
from rlhfbench.runs.progress import LineProgress


def make_server(models=(), *, preload=()):
    """A fork server of fake cases, in place of ``runner.make_server``."""
    return ForkServer(target="fake_case:run_case", preload=preload)


SOME_MEMORY = {"model_bytes": 3, "activation_bytes": 2, "rollout_bytes": 1, "total_bytes": 6, "peak_phase": "score"}


def run_case(request, send):
    kind = request["case"]["options"]["data"]["prompt_field"]
    send({"notify": "build"})
    if request.get("plan"):
        PLANS.get(kind, _planned)(request, send)
        return
    send({"notify": "phase:score"})
    BEHAVIOURS[kind](request, send)


def _ok(request, send):
    result = {"memory": SOME_MEMORY, "work": None, "num_threads": 5}
    send({"result": {"outcome": "ok", "error": None, **result}})


def _in_blocks(request, send):
    """Is timed in as many blocks as asked for, two by default; block n takes n + 1 seconds a step."""
    number, num_blocks = request["settings"]["block"], request["settings"]["num_blocks"] or 2
    block = {"phases": {"generate": [number + 1.0]}, "stopped_because": "budget", "error": None}
    latency = {"phases": {"generate": {"kind": "inference"}}, "num_blocks": num_blocks}
    once = {"memory": SOME_MEMORY, "latency": latency} if number == 0 else {}
    send({"result": {"outcome": "ok", "error": None, **once, "block": block}})


def _steady(request, send, seconds=1.0):
    """A block of two phases; an injected fault makes generate slower, or the total larger."""
    settings = request["settings"]
    injected = settings.get("injected") or {}
    num_steps = 1 if settings.get("turns") is None else _take_turns(settings["turns"])
    share = injected.get("share", 0.0) if injected.get("phase", "generate") == "generate" else 0.0
    generate_s = 2 * seconds * (1 + share)
    phases = {"generate": [generate_s] * num_steps, "optimize": [seconds] * num_steps}
    block = {"phases": phases, "stopped_because": "budget", "in_turns": "turns" in settings, "error": None}
    kinds = {"generate": {"kind": "inference"}, "optimize": {"kind": "update"}}
    memory = {**SOME_MEMORY, "total_bytes": 6 + injected.get("held_bytes", 0), "views": {"host_peak_bytes": 1}}
    once = {"memory": memory, "latency": {"phases": kinds, "num_blocks": settings["num_blocks"] or 2}}
    send({"result": {"outcome": "ok", "error": None, **({} if settings["block"] else once), "block": block}})


def _take_turns(path):
    turns, num_steps = Turns(path), 0
    while turns.wait():
        turns.done()
        num_steps += 1
    return max(num_steps, 1)  # as the real one: a block without a turn is whole all the same


def _noisy(request, send):
    """Blocks that differ by half or more, in another order on a side with an injection and on one without."""
    settings = request["settings"]
    order = 1 if settings.get("injected") is None else 2
    _steady(request, send, seconds=1.0 + 0.5 * (settings["block"] * order % 3))


def _crashes_with_an_injection(request, send):
    if request["settings"].get("injected") is not None:
        os._exit(7)
    _steady(request, send)


def _crashes_later_with_an_injection(request, send):
    if request["settings"].get("injected") is not None and request["settings"]["block"] == 1:
        os._exit(7)
    _steady(request, send)


def _crashes_without_an_injection(request, send):
    if request["settings"].get("injected") is None:
        os._exit(7)
    _steady(request, send)


def _renames_a_phase_with_an_injection(request, send):
    name = "optimize" if request["settings"].get("injected") is None else "learn"

    def renamed(message):
        result = message["result"]
        for phases in (result["block"]["phases"], result.get("latency", {}).get("phases", {"optimize": None})):
            phases[name] = phases.pop("optimize")
        send(message)

    _steady(request, renamed)


def _as_the_revision_says(request, send):
    """A steady case with the fault that ``mine.py`` of its side's revision names."""
    import mine

    _steady({**request, "settings": {**request["settings"], "injected": mine.FAULT}}, send)


def _interrupts_the_gate_in_a_turn(request, send):
    """Leaves a file with its process id, and sends Ctrl-C to the gate when its turn comes."""
    path = request["settings"].get("turns")
    if path is None:
        _steady(request, send)
        return
    (Path(os.environ["GATE_CASES"]) / str(os.getpid())).touch()
    turns = Turns(path)  # kept: its end would end the turn before Ctrl-C comes
    if turns.wait():
        os.kill(int(os.environ["GATE_PID"]), signal.SIGINT)
    _hang(request, send)


def _out_of_memory_in_block_1(request, send):
    if request["settings"]["block"] == 1:
        send({"result": worker.failure(MemoryError("no room"), "score")})
    else:
        _in_blocks(request, send)


def _planned(request, send):
    send({"result": {"outcome": "ok", "error": None, "memory": {**SOME_MEMORY, "total_bytes": 7}}})


def _unplannable(request, send):
    send({"result": worker.failure(ValueError("no fake of that"), "plan")})


def _with_timeline(request, send):
    timeline = {"phases": [], "events": [1], "parts_bytes": {"base": [6]}}
    send({"result": {"outcome": "ok", "error": None, "memory": SOME_MEMORY, "timeline": timeline}})


def _echo(request, send):
    send({"result": {"outcome": "ok", "error": None, "prompts": request}})


def _oom_from_batch_4(request, send):
    if request["case"]["batch_size"] < 4:
        _ok(request, send)
    else:
        send({"result": worker.failure(MemoryError("no room"), "score")})


def _needs_more_than_its_limit(request, send):
    worker.limit_memory("cpu", request["memory_limit_bytes"])
    try:
        bytearray(2 * request["memory_limit_bytes"])
    except MemoryError as error:
        worker.lift_memory_limit()
        send({"result": worker.failure(error, "score")})


def _hang(request, send):
    send({"notify": f"hanging {os.getpid()} {os.getppid()}"})
    time.sleep(600)


def _hang_on_the_first_machine(request, send):
    """Tells its process id through a pipe and hangs; where it is tried again, it ends well."""
    fifo = Path(os.environ["FAKE_CASE_FIFO"])
    if fifo.exists():
        with fifo.open("w") as pipe:
            fifo.unlink()
            print(os.getpid(), file=pipe)
        _hang(request, send)
    _ok(request, send)


def _hang_with_a_helper(request, send):
    helper = os.fork()
    if helper == 0:
        time.sleep(600)
    send({"notify": f"helped {helper}"})
    _hang(request, send)


def _die_between_messages(request, send):
    send({"notify": f"alive {os.getpid()}"})
    os.kill(os.getpid(), signal.SIGKILL)


def _segfault(request, send):
    import ctypes

    ctypes.string_at(0)


def _exit(request, send):
    print("before the end", file=sys.stderr)
    os._exit(7)


def _chatter(request, send):
    print("said on stdout")
    for _ in range(3):
        send({"notify": "x" * 100_000})  # more than a pipe holds
    _ok(request, send)


def _wait_to_be_told(request, send):
    Path(request["fifo"]).read_text()  # returns when the test has opened and closed the other end
    _ok(request, send)


def _state(request, send):
    handlers = [
        signal.getsignal(n) in (signal.SIG_DFL, signal.default_int_handler) for n in (signal.SIGINT, signal.SIGTERM)
    ]
    send({"result": {"outcome": "ok", "error": None, "prompts": {"defaults": handlers, "parent": os.getppid()}}})


def _large(request, send):
    """Takes 300 MiB for a moment and ends well."""
    from rlhfbench.measure import host

    _take_300_mib()
    views = {"host_peak_bytes": host.peak_resident_bytes()}
    send({"result": {"outcome": "ok", "error": None, "memory": {**SOME_MEMORY, "views": views}}})


def _large_then_fails(request, send):
    _take_300_mib()
    send({"result": worker.failure(MemoryError("no room"), "score")})


def _large_then_dies(request, send):
    _take_300_mib()
    os.kill(os.getpid(), signal.SIGKILL)


def _take_300_mib():
    del [b"x" * (300 * 2**20)][:]


def _dies_in_a_phase(request, send):
    for name in ("score", "a-phase-with-a-long-name" * 30, "optimize"):
        send({"phase": name})
    os.kill(os.getpid(), signal.SIGKILL)


BEHAVIOURS = {
    "in-a-phase": _dies_in_a_phase,
    "large": _large,
    "large-then-fails": _large_then_fails,
    "large-then-dies": _large_then_dies,
    "ok": _ok,
    "echo": _echo,
    "blocks": _in_blocks,
    "steady": _steady,
    "noisy": _noisy,
    "head-crashes": _crashes_with_an_injection,
    "head-crashes-later": _crashes_later_with_an_injection,
    "base-crashes": _crashes_without_an_injection,
    "renames-a-phase": _renames_a_phase_with_an_injection,
    "revision": _as_the_revision_says,
    "interrupts": _interrupts_the_gate_in_a_turn,
    "oom-in-block-1": _out_of_memory_in_block_1,
    "oom-from-batch-4": _oom_from_batch_4,
    "over-limit": _needs_more_than_its_limit,
    "hang": _hang,
    "hang-first": _hang_on_the_first_machine,
    "hang-with-helper": _hang_with_a_helper,
    "die": _die_between_messages,
    "segfault": _segfault,
    "exit": _exit,
    "chatter": _chatter,
    "state": _state,
    "wait": _wait_to_be_told,
    "timeline": _with_timeline,
    "plan-fails": _ok,
    "plan-dies": _ok,
}
# What becomes of a plan, where it is not the usual.
PLANS = {"plan-fails": _unplannable, "plan-dies": _die_between_messages}


class EchoProgress(LineProgress):
    """Prints the stage of a case to standard output, for a test that waits for it."""

    def __init__(self):
        super().__init__(sys.stderr)

    def doing(self, what):
        print(what, flush=True)


if __name__ == "__main__":
    from rlhfbench.cli import main as cli

    modules = tuple(sys.argv[1].split(",")) if sys.argv[1] else ()
    runner.make_server = functools.partial(make_server, preload=modules)
    runner.make_progress = EchoProgress
    sys.argv[1:] = sys.argv[2:]
    cli.main()
