"""Measures and plans Hydra-PPO of Llama-7B's shape on the device of ``tests/null_cuda``; prints bytes as JSON."""

import json

from rlhfbench.measure import MeasurementOptions, measure_case
from rlhfbench.planning.predict import plan_case
from rlhfkernels import Case, Options


def main() -> None:
    case = Case(
        method="hydra",
        model="llama-7b",
        prompt_len=400,
        completion_len=400,
        batch_size=4,
        dtype="bfloat16",
        device="cuda",
        options=Options.of({"lora.r": 128}),
    )
    found = measure_case(case, MeasurementOptions(time_budget_s=0.05, num_blocks=1), lambda name: None)
    print(
        json.dumps(
            {"planned": plan_case(case).total_bytes, "fast_paths": found["fast_paths"], **found["memory"]["views"]}
        )
    )


if __name__ == "__main__":
    main()
