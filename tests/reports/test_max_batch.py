from __future__ import annotations

import pandas as pd
from rich.console import Console

from rlhfreports.max_batch import max_batch_table


def test_planned_and_found_batches_share_a_row() -> None:
    frame = pd.DataFrame(
        {
            "title": ["A-PPO", "B-PPO"],
            "setting": ["modern", "modern"],
            "lora_rank": [16, 16],
            "options": ["", ""],
            "seed": [0, 0],
            "strategy": ["", ""],
            "world_size": [1, 1],
            "model": ["tiny", "tiny"],
            "seq_len": [64, 128],
            "planned": pd.array([9, None], dtype="Int64"),
            "largest_ok": pd.array([8, 0], dtype="Int64"),
            "smallest_failing": pd.array([9, None], dtype="Int64"),
            "num_tries": [5, 1],
            "stopped_because": ["batch 9 was out of memory.", "it ended."],
        }
    )
    console = Console(width=200, record=True)
    console.print(max_batch_table(frame))
    first, second = (line.split() for line in console.export_text().splitlines() if "-PPO" in line)
    assert first == ["A-PPO", "tiny", "64", "9", "8", "9", "5", "batch", "9", "was", "out", "of", "memory."]
    assert second[:7] == ["B-PPO", "tiny", "128", "–", "0", "–", "1"]
    frame["setting"] = ["modern", "paper"]
    console.print(max_batch_table(frame))
    (row,) = (line.split() for line in console.export_text().splitlines() if "B-PPO" in line)
    assert row[:3] == ["B-PPO", "paper", "tiny"]
    frame["strategy"], frame["world_size"] = ["", "ZeRO-1"], [1, 8]
    console.print(max_batch_table(frame))
    (row,) = (line.split() for line in console.export_text().splitlines() if "B-PPO" in line)
    assert row[:5] == ["B-PPO", "paper", "ZeRO-1", "8", "tiny"]
    frame["lora_rank"], frame["options"], frame["seed"] = [8, 64], ["", "ppo.gamma=0.9"], [0, 1]
    console.print(max_batch_table(frame))
    first, second = (line.split()[:7] for line in console.export_text().splitlines() if "-PPO" in line)
    assert first == ["A-PPO", "modern", "8", "0", "1", "tiny", "64"]
    assert second == ["B-PPO", "paper", "64", "ppo.gamma=0.9", "1", "ZeRO-1", "8"]
