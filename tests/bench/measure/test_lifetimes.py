from __future__ import annotations

import bisect

import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhfbench.measure.ledger import Ledger
from rlhfbench.measure.lifetimes import MAX_LIFETIMES, Lifetime, ReplayedTally, largest, lifetime_columns
from rlhfbench.measure.memory import measure_memory
from rlhfbench.measure.tally import Recorder, replay
from rlhfbench.measure.timeline import Timeline
from rlhfkernels.config.case import Case
from rlhfkernels.observer import PARTS, Observer
from rlhfkernels.training.step import build_step


def lifetime(part: int, num_bytes: int, first: int, end: int) -> Lifetime:
    return Lifetime(part, num_bytes, first, first, end, (num_bytes,), torch.uint8, None)


STRETCHES = st.builds(
    lambda part, num_bytes, first, length: lifetime(part, num_bytes, first, first + length),
    st.integers(0, 1),
    st.integers(1, 9),
    st.integers(0, 30),
    st.integers(0, 10),
)


@given(st.lists(STRETCHES, max_size=30), st.sets(st.integers(0, 40), max_size=8), st.integers(1, 3))
def test_the_largest_of_each_part_at_each_point(lifetimes: list[Lifetime], points: set[int], num: int) -> None:
    """The reference sorts what lives at each point."""
    expected = set()
    for point in points:
        for part in (0, 1):
            alive = [i for i, each in enumerate(lifetimes) if each.part == part]
            alive = [i for i in alive if lifetimes[i].first_event <= point < lifetimes[i].end_event]
            expected |= set(sorted(alive, key=lambda i: -lifetimes[i].num_bytes)[:num])
    found = largest(lifetimes, sorted(points), num)
    assert sorted(map(id, found)) == sorted(id(lifetimes[i]) for i in expected)


def test_a_storage_ends_a_stretch_when_it_is_moved_resized_and_freed() -> None:
    ended: list[Lifetime] = []
    with Ledger("cpu", on_lifetime=ended.append) as ledger:
        one = torch.zeros(2, 3)  # event 1
        ledger.tag("rollout", (one,))  # 2
        one.untyped_storage().resize_(48)  # 3: both sizes; 4: the new one
        del one  # 5
        kept = torch.zeros(5, dtype=torch.float64)  # 6
    rollout, temporary = PARTS.index("rollout"), PARTS.index("temporary")
    assert [each[:5] for each in ended] == [
        (temporary, 24, 1, 1, 2),
        (rollout, 24, 1, 2, 4),
        (rollout, 48, 1, 4, 5),
        (temporary, 40, 6, 6, 7),
    ]
    assert [(each.shape, each.dtype) for each in ended[2:]] == [((2, 3), torch.float32), ((5,), torch.float64)]
    assert {str(each.op) for each in ended} == {"aten.zeros.default"}
    assert kept.numel() == 5


def test_the_storages_of_a_real_step_fit_into_their_parts() -> None:
    case = Case(method="hydra", model="tiny", prompt_len=4, completion_len=8, batch_size=2)
    timeline, step = Timeline(max_points=200), build_step(case)
    ledger = measure_memory(step, "cpu", lambda text: None, timeline)
    found = timeline.to_dict(ledger.peaks)
    rows = [dict(zip(found["tensors"], row, strict=True)) for row in zip(*found["tensors"].values(), strict=True)]
    assert len(rows) == MAX_LIFETIMES
    assert {"base", "adapters", "optimizer", "activations", "kv_cache", "temporary"} <= {row["part"] for row in rows}
    # A tensor may be declared after a moment: the parts of peaks are corrected, stretches are not.
    peaks = {peak.event for peak in ledger.peaks.values()}
    for place, event in enumerate(found["events"]):
        for part, sizes in found["parts_bytes"].items():
            alive = [row for row in rows if row["part"] == part and row["first_event"] <= event < row["end_event"]]
            assert event in peaks or sum(row["bytes"] for row in alive) <= sizes[place], (event, part)
    # Every stretch is there for one of the points, and the largest tensor of a part that lives through all is named.
    for row in rows:
        i = bisect.bisect_left(found["events"], row["first_event"])
        assert found["events"][i] < row["end_event"]
        assert row["born_event"] <= row["first_event"]
    widest = max((row for row in rows if row["part"] == "base"), key=lambda row: row["bytes"])
    model = [parameter for part, parameter in step.persistent_tensors() if part == "base"]
    assert widest["bytes"] == max(tensor.untyped_storage().nbytes() for tensor in model)
    assert widest["dtype"] == "float32"


def test_a_timeline_forgets_storages_between_its_points() -> None:
    timeline = Timeline(max_points=16, max_stretches=4)
    for event in range(1, 20_001):
        timeline.note([event if part == 0 else 0 for part in range(len(PARTS))])
        timeline.note_lifetime(lifetime(0, 10**6 if event == 7777 else 5, event, event + 1))
        assert len(timeline._lifetimes) <= timeline._max_lifetimes < 2000
    timeline.note_lifetime(lifetime(1, 3, 1, 20_001))
    columns = lifetime_columns(timeline._lifetimes, [20_000])
    assert columns["bytes"] == [3, 5]
    assert columns["part"] == [PARTS[1], PARTS[0]]


def test_a_measurement_with_names_counts_the_same_bytes() -> None:
    step = build_step(Case(method="lora", model="tiny", prompt_len=4, completion_len=8, batch_size=2))
    step.run()
    with_it = measure_memory(step, "cpu", lambda text: None, Timeline())
    without = measure_memory(step, "cpu", lambda text: None)
    assert (with_it.peaks, with_it.num_changes) == (without.peaks, without.num_changes)


def test_a_replay_tells_the_lifetimes_that_the_ledger_told() -> None:
    told: list[Lifetime] = []
    recorder = Recorder()
    with Ledger("cpu", tally=recorder, on_lifetime=told.append) as ledger:
        first, second = torch.zeros(4), torch.zeros(4)
        other = torch.ones(2, 2)  # as many bytes, made by another op
        ledger.tag("rollout", (second,))
        ledger.enter_phase("score")
        del first, other  # in the order in which they were made
        ledger.exit_phase("score")
        assert second.numel() == 4
    replayed: list[Lifetime] = []
    tally = ReplayedTally(lambda parts: None, replayed.append)
    replay(recorder.changes, tally, Observer())
    tally.end()
    assert sorted(told, key=str) == sorted(replayed, key=str)
    assert len(told) == 4


def test_what_a_replay_cannot_find_is_the_youngest_of_its_size() -> None:
    recorder, found = Recorder(), []
    with Ledger("cpu", tally=recorder):
        one = torch.zeros(4)
        del one
    made, freed = (change for change in recorder.changes if change[0] == "grow")
    tally = ReplayedTally(lambda parts: None, found.append)
    freed = (*freed[:3], freed[3]._replace(op=None))
    replay([made, freed, freed], tally, Observer())
    assert [(each.shape, each.born_event, each.end_event) for each in found] == [((4,), 1, 2)]
