"""The worker: runs one case in a forked process and sends its result as one message."""

from __future__ import annotations

import dataclasses
import errno
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from rlhfbench.measure.options import MeasurementOptions
from rlhfbench.network import address_toward, interface_of
from rlhfbench.processes import num_cores
from rlhfkernels.config.case import Case
from rlhfkernels.errors import RlhfKernelsError

if TYPE_CHECKING:
    from rlhfbench.planning.prediction import Plan

PHASE_PREFIX = "phase:"
_UNLIKE = ("profile",)  # stages in which rank 0 alone writes files, and the others wait for it
MAX_MESSAGE_CHARS = 500

# Messages of errors without a type of their own: torch's CPU allocator on Linux and elsewhere, C++'s new, CUDA's driver
# and its libraries.
_OUT_OF_MEMORY_MESSAGES = (
    "can't allocate memory",
    "cannot allocate memory",
    "not enough memory",
    "out of memory",
    "std::bad_alloc",
    "cuda_error_out_of_memory",
    "_status_alloc_failed",
)
# Messages of gloo and NCCL when a peer is gone.
_LOST_PEER_MESSAGES = ("gloo", "nccl", "connection closed by peer", "connection reset by peer")


class Stage:
    """The current stage of a case. Sends each change, and keeps the last for the message of a failure.

    Args:
        send: sends one message.
        is_rank: the process is one of several, and says the phase of timed steps too: if it dies, it is named with it.
    """

    def __init__(self, send: Callable[[dict[str, Any]], None], *, is_rank: bool = False) -> None:
        self._send, self._is_rank = send, is_rank
        self._is_stepping, self._are_alike = False, True
        self.name: str | None = None

    def notify(self, name: str) -> None:
        """Enters a stage: ``build``, ``timing`` and so on, or ``phase:`` and the name of a phase."""
        self._send({"notify": name})
        self._are_alike = self._are_alike and name not in _UNLIKE
        self._is_stepping = self._are_alike and (self._is_stepping or name.startswith(PHASE_PREFIX))
        self.enter(name.removeprefix(PHASE_PREFIX))

    def enter(self, name: str) -> None:
        """Enters a stage or a phase quietly: it is told only if the process dies in it."""
        self.name = name
        if self._is_rank:
            self._send({"phase": name, "is_stepping": self._is_stepping})


def run_case(request: dict[str, Any], send: Callable[[dict[str, Any]], None]) -> None:
    """Runs ``request["case"]`` and sends ``{"result": {"outcome", "error", ...}}``.

    Args:
        request: ``case`` (as in a record), and either ``plan: True`` (and ``num_threads``) to predict its memory, or
            ``settings`` (the fields of ``MeasurementOptions``) and ``memory_limit_bytes`` to measure it. ``rank`` makes
            the process a rank of several: see ``rlhfbench.runs.ranks.rank_request``.
        send: sends one message to the runner.
    """
    place = request.get("rank")
    stage = Stage(send, is_rank=place is not None)
    try:
        case = Case.from_dict(request["case"])
        if request.get("plan"):
            plan = _plan(case, stage, request.get("num_threads"))
            send({"result": {"outcome": "ok", "error": None, "memory": plan.memory, "timeline": plan.timeline}})
            return
        stage.notify("import")
        from rlhfbench.measure import measure_case

        limit_bytes = request["memory_limit_bytes"]
        options = MeasurementOptions(**request["settings"])
        ranked: dict[str, Any] = {}
        if place is not None:
            case, options, ranked = join(case, options, place, stage)
        elif case.device.startswith("cuda:"):
            import torch

            # Not every library starts its kernels on the device of their tensors; and no memory of device 0 is taken.
            torch.cuda.set_device(case.device)
        result = measure_case(
            case,
            options,
            stage.notify,
            step_begins=lambda: None if limit_bytes is None else limit_memory(case.device, limit_bytes),
            **ranked,
        )
    except BaseException as error:
        lift_memory_limit()  # the message of a failure needs memory too
        traceback.print_exc()
        found = failure(error, stage.name)
        if place is not None:
            stack = "".join(traceback.format_exception(error))
            found |= {"stack": stack, "lost_peer": is_lost_peer(error)}
        send({"result": found})
    else:
        send({"result": {"outcome": "ok", "error": None, **result}})


def join(
    case: Case, options: MeasurementOptions, place: dict[str, Any], stage: Stage
) -> tuple[Case, MeasurementOptions, dict[str, Any]]:
    """Joins the world of a case; returns the case and options of this rank, and its arguments of ``measure_case``.

    A rank has a CUDA device of its own, and its share of the machine's cores.
    """
    from rlhfkernels.parallel.world import TIMEOUT_S, join_world

    stage.notify("join")
    if case.device == "cuda":
        case = dataclasses.replace(case, device=f"cuda:{place['local_rank']}")
    if options.num_threads is None:
        options = dataclasses.replace(options, num_threads=threads_of_a_rank(place["local_size"]))
    if sys.platform == "linux":
        _choose_interface(place)
    # A case's ranks meet at an address of their own, and not at the launcher's. DeepSpeed reads the rest.
    os.environ.pop("TORCHELASTIC_USE_AGENT_STORE", None)
    os.environ |= {"RANK": str(place["rank"]), "WORLD_SIZE": str(place["size"])}
    os.environ["LOCAL_RANK"] = str(place["local_rank"])
    world = join_world(
        rank=place["rank"],
        size=place["size"],
        address=place["address"],
        device=case.device,
        timeout_s=place["timeout_s"] or TIMEOUT_S,
    )
    return case, options, {"world": world, "enter_phase": stage.enter}


def threads_of_a_rank(local_size: int) -> int:
    """A rank's share of this machine's cores, of which ``local_size`` ranks run here."""
    return max(1, num_cores() // local_size)


def _choose_interface(place: dict[str, Any]) -> None:
    """Has gloo use the interface on the way to rank 0, and the loopback where all ranks are here.

    Gloo would take the address of this machine's name, which may have none, or one that others cannot connect to.
    """
    is_alone = place["local_size"] == place["size"]
    host = None if is_alone else urlsplit(place["address"]).hostname
    address = address_toward(host or "127.0.0.1")
    name = None if address is None else interface_of(address)
    if name is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


def _plan(case: Case, stage: Stage, num_threads: int | None) -> Plan:
    """A plan of ``case`` with its timeline. Scratch buffers on the CPU grow with the number of threads."""
    stage.notify("plan")
    import torch

    from rlhfbench.planning.predict import plan_case

    if num_threads is not None:
        torch.set_num_threads(num_threads)

    return plan_case(case, with_timeline=True)


def failure(error: BaseException, phase: str | None) -> dict[str, Any]:
    """The ``outcome`` and ``error`` of a case that raised ``error`` in ``phase``."""
    if is_out_of_memory(error):
        outcome = "oom"
    elif isinstance(error, RlhfKernelsError):
        outcome = "invalid"
    else:
        outcome = "crashed"
    message = " ".join(str(error).split())[:MAX_MESSAGE_CHARS]
    if not message or isinstance(error, (KeyError, SystemExit)):  # a key or a number says nothing by itself
        message = f"{type(error).__name__} {message}".strip() + "."
    return {"outcome": outcome, "error": {"kind": type(error).__name__, "message": message, "phase": phase}}


def is_out_of_memory(error: BaseException) -> bool:
    """True if ``error``, or one that caused it, means out of memory on any device."""
    torch = sys.modules.get("torch")
    types: tuple[type[BaseException], ...] = (MemoryError,)
    if torch is not None:
        types += (torch.OutOfMemoryError,)
    for link in _chain(error):
        if isinstance(link, types) or (isinstance(link, OSError) and link.errno == errno.ENOMEM):
            return True
        if isinstance(link, RuntimeError) and any(words in str(link).lower() for words in _OUT_OF_MEMORY_MESSAGES):
            return True
    return False


def is_lost_peer(error: BaseException) -> bool:
    """True if ``error`` means that another rank ended, or did not come, while this one waited for it."""
    torch = sys.modules.get("torch")
    for link in _chain(error):
        if torch is not None and isinstance(link, torch.distributed.DistError):
            return True
        if isinstance(link, RuntimeError) and any(words in str(link).lower() for words in _LOST_PEER_MESSAGES):
            return True
    return False


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        yield link
        link = link.__cause__ or link.__context__


def limit_memory(device: str, limit_bytes: int) -> None:
    """Limits the memory of this process to ``limit_bytes`` above its current use (CPU) or in total (CUDA).

    On a CPU this sets the soft ``RLIMIT_DATA``, which Linux enforces and macOS ignores.
    """
    if device == "cpu":
        import resource  # here, as Windows has none

        limit = _data_bytes() + limit_bytes
        hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
        resource.setrlimit(resource.RLIMIT_DATA, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))
        return
    import torch

    total = torch.cuda.get_device_properties(device).total_memory
    # ``None`` is the current device: torch takes no ``cuda`` without an index here, unlike elsewhere.
    torch.cuda.set_per_process_memory_fraction(min(1.0, limit_bytes / total), torch.device(device).index)


def lift_memory_limit() -> None:
    """Removes the limit of ``limit_memory`` on the CPU."""
    import resource

    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    resource.setrlimit(resource.RLIMIT_DATA, (hard, hard))


def _data_bytes() -> int:
    """Bytes that already count towards ``RLIMIT_DATA``; 0 on other systems than Linux."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return 0
    for line in status.splitlines():
        if line.startswith("VmData:"):
            return int(line.split()[1]) * 1024
    return 0
