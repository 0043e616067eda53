"""As a program: a process of a launcher on a machine of its own. That of rank 0 runs a case of each named kind."""

import json
import sys
import time
from pathlib import Path

from rlhfbench.errors import SweepError
from rlhfbench.launch import find_launch
from rlhfbench.runs.follower import follower
from rlhfbench.runs.forkserver import ForkServer
from rlhfbench.runs.leader import leader
from rlhfkernels.config.case import Case
from rlhfkernels.config.options import Options

ZERO = {"parallel.strategy": "deepspeed", "parallel.zero_stage": 3, "parallel.reduce_bucket_size": 100_000}


def request_of(kind):
    """The request of a case whose step is one of ``rank_steps``, or a method's own under ZeRO."""
    is_zero = kind == "zero"
    options = ZERO if is_zero else {"parallel.strategy": "ddp", "data.prompt_field": kind}
    sizes = {"prompt_len": 4, "completion_len": 4, "batch_size": 1, "dtype": "float32"}
    case = Case(method="hydra", model="tiny", **sizes, options=Options.of({**options, "parallel.world_size": 2}))
    return {
        "case": case.to_dict(),
        "memory_limit_bytes": None,
        "settings": {"time_budget_s": 0.2, "num_blocks": 1, "step": None if is_zero else "rank_steps:make"},
    }


def main(folder, *kinds):
    preload = ("rank_steps", "rlhfbench.measure.measurements")
    with ForkServer(preload=preload, paths=(str(Path(__file__).parent),)) as server:
        if find_launch().rank:
            try:
                follower().follow(server)
            except SweepError as error:
                sys.exit(f"{time.monotonic()} {error}")
            return
        leader().start()
        for kind in kinds:
            messages = []
            how = {"log_path": Path(folder) / f"{kind}.log", "timeout_s": 60.0, "on_message": messages.append}
            leader().run(server, request_of(kind), 2, **how)
            (result,) = [message["result"] for message in messages if "result" in message]
            found = {key: result.get(key) for key in ("outcome", "error", "world")}
            print(json.dumps({**found, "ended_s": time.monotonic()}), flush=True)
        leader().end()


if __name__ == "__main__":
    main(*sys.argv[1:])
