from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhfbench.measure.announcer import Announcer
from rlhfbench.measure.ledger import Ledger
from rlhfbench.measure.memory import measure_memory
from rlhfbench.measure.tally import Snapshot
from rlhfbench.measure.timeline import MAX_POINTS, MAX_STRETCHES, Timeline
from rlhfkernels.config.case import Case
from rlhfkernels.config.options import Options
from rlhfkernels.observer import PARTS
from rlhfkernels.training.step import build_step

CASE = Case(
    method="hydra",
    model="tiny",
    prompt_len=4,
    completion_len=8,
    batch_size=2,
    options=Options.of({"engine.micro_batch_size": 1}),
)


def live(total: int) -> list[int]:
    """Returns bytes by part that sum to ``total``."""
    return [total - 1, 1, *[0] * (len(PARTS) - 2)]


def snapshot(total: int, event: int) -> Snapshot:
    return Snapshot(total_bytes=total, parts=dict(zip(PARTS, live(total), strict=True)), event=event)


def totals(found: dict[str, object]) -> dict[int, int]:
    """Returns the total of every point by event."""
    rows = zip(*found["parts_bytes"].values(), strict=True)
    return {event: sum(row) for event, row in zip(found["events"], rows, strict=True)}


class Everything(Ledger):
    """A ledger that also keeps the parts after every change, and the number of changes at every phase boundary."""

    def __init__(self, timeline: Timeline) -> None:
        self.history, self.boundaries, self._kept = [], [], timeline
        super().__init__("cpu", self._note)

    def _note(self, parts: list[int]) -> None:
        self.history.append(list(parts))
        self._kept.note(parts)

    def enter_phase(self, name: str) -> None:
        super().enter_phase(name)
        self.boundaries.append((name, self.num_changes))

    def exit_phase(self, name: str) -> None:
        super().exit_phase(name)
        self.boundaries.append((name, self.num_changes))


@pytest.mark.parametrize("max_points", [16, MAX_POINTS])
def test_a_real_step(max_points: int) -> None:
    timeline = Timeline(max_points=max_points, max_stretches=12)
    ledger, step = Everything(timeline), build_step(CASE)
    with ledger:
        for part, tensor in step.persistent_tensors():
            ledger.tag(part, (tensor,))
        ledger.track_gradients(step.trained_parameters())
        step.run(Announcer(lambda text: None, ledger, timeline))
    found = timeline.to_dict(ledger.peaks)
    assert found["num_events"] == len(ledger.history) == ledger.num_changes
    # Every point has the total after its event. Its parts may be newer: a tensor is declared just after it was made.
    assert totals(found) == {event: sum(ledger.history[event - 1]) for event in found["events"]}
    assert len(found["events"]) <= max_points + len(ledger.peaks)
    for name, peak in ledger.peaks.items():
        at = found["events"].index(peak.event)
        assert {part: sizes[at] for part, sizes in found["parts_bytes"].items()} == peak.parts, name
    assert found["peak"] == {
        "event": ledger.peaks[ledger.peak_phase].event,
        "phase": ledger.peak_phase,
        "total_bytes": ledger.peak.total_bytes,
    }
    assert max(totals(found).values()) == ledger.peak.total_bytes
    begins, ends = ledger.boundaries[::2], ledger.boundaries[1::2]
    assert [(row["names"], row["first_event"], row["last_event"]) for row in found["phases"]] == [
        ([name], first, last) for (name, first), (_, last) in zip(begins, ends, strict=True)
    ]


def test_many_events_make_a_small_timeline_with_the_peak() -> None:
    timeline, num_events = Timeline(), 100_000
    petabyte = 10**15
    for event in range(1, num_events + 1):
        if event % 500 == 1:
            timeline.enter_phase("update_actor_critic")
        timeline.note([petabyte + (event == 77_777)] * len(PARTS))
        if event % 500 == 0:
            timeline.exit_phase("update_actor_critic")
    parts = dict.fromkeys(PARTS, petabyte + 1)
    found = timeline.to_dict(
        {"update_actor_critic": Snapshot(total_bytes=sum(parts.values()), parts=parts, event=77_777)}
    )
    assert found["num_events"] == num_events
    assert len(found["events"]) <= MAX_POINTS + 1
    assert 77_777 in found["events"]
    assert len(found["phases"]) <= MAX_STRETCHES
    assert len(json.dumps(found)) < 200_000
    # Joined stretches keep their outer boundaries.
    joints = [row["last_event"] for row in found["phases"]]
    assert [row["first_event"] for row in found["phases"]] == [0, *joints[:-1]]
    assert joints[-1] == num_events
    assert all(event % 500 == 0 for event in joints)


@given(st.lists(st.integers(1, 99), min_size=1, max_size=120), st.integers(1, 4), st.integers(5, 12))
def test_the_highest_moment_of_every_stretch_is_kept(heights: list[int], num_phases: int, max_points: int) -> None:
    """The reference is a loop over all heights."""
    timeline = Timeline(max_points=max_points, max_stretches=max(num_phases + 2, 4))
    length = -(-len(heights) // num_phases)
    mine = [heights[i : i + length] for i in range(0, len(heights), length)]
    for part in mine:
        with timeline.phase("a"):
            for height in part:
                timeline.note(live(height))
    highest = max(heights)
    found = timeline.to_dict({"a": snapshot(highest, heights.index(highest) + 1)})
    assert found["events"] == sorted(set(found["events"]))
    assert len(found["events"]) <= max(max_points, num_phases + 2) + 1
    assert totals(found).items() <= dict(enumerate(heights, start=1)).items()
    for i, row in enumerate(found["phases"]):
        assert (row["first_event"], row["last_event"]) == (i * length, i * length + len(mine[i]))
        kept = [total for event, total in totals(found).items() if row["first_event"] < event <= row["last_event"]]
        assert max(kept) == max(mine[i])


def test_the_ledgers_peak_is_a_point_even_if_another_moment_was_as_high() -> None:
    """A tensor is declared just after it was made: two moments have the same total and different parts."""
    timeline = Timeline(max_points=4, max_stretches=2)
    with timeline.phase("a"):
        for event in range(1, 17):
            timeline.note(live(9 if event in (9, 10) else 2))
    named = Snapshot(total_bytes=9, parts={**dict.fromkeys(PARTS, 0), "rollout": 9}, event=10)
    found = timeline.to_dict({"a": named})
    assert found["parts_bytes"]["rollout"][found["events"].index(10)] == 9
    assert found["peak"]["event"] == 10


def test_a_phase_inside_a_phase() -> None:
    timeline = Timeline()
    with timeline.phase("outer"):
        timeline.note(live(1))
        with timeline.phase("inner"):
            timeline.note(live(5))
        timeline.note(live(2))
    found = timeline.to_dict({"outer": snapshot(2, 3), "inner": snapshot(5, 2)})
    assert [(row["names"], row["first_event"], row["last_event"]) for row in found["phases"]] == [
        (["outer"], 0, 1),
        (["inner"], 1, 2),
        (["outer"], 2, 3),
    ]
    assert found["peak"] == {"event": 2, "phase": "inner", "total_bytes": 5}


def test_a_long_phase_takes_no_points_from_a_short_one() -> None:
    timeline = Timeline(max_points=64, max_stretches=4)
    with timeline.phase("short"):
        for _ in range(20):
            timeline.note(live(1))
    with timeline.phase("long"):
        for _ in range(10_000):
            timeline.note(live(2))
    short, long = timeline.to_dict({"long": snapshot(2, 21)})["phases"]
    assert (short["events_per_point"], long["events_per_point"] >= 200) == (1, True)


def test_the_memory_measurement_keeps_a_timeline_only_on_request() -> None:
    step = build_step(CASE)
    timeline = Timeline()
    with_it = measure_memory(step, "cpu", lambda text: None, timeline)
    assert with_it.num_changes == timeline.to_dict(with_it.peaks)["num_events"]
    without = measure_memory(step, "cpu", lambda text: None)
    assert without._tally._on_change is None
    assert without.peaks == with_it.peaks
