"""Every section, from runs of every kind: specifications as data, and inputs that are odd."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from typing import Any

import pandas as pd
import pytest

from rlhfreports.page.blocks import Block, Chart, Section, Table, Text
from rlhfreports.page.configuration import differences, facts, warnings
from rlhfreports.page.data import Page, Run, hardware_of
from rlhfreports.page.render import page_html
from rlhfreports.page.sections import sections_of
from rlhfreports.page.times import slope_texts

Runs = Callable[..., Run]
Rows = tuple[dict[str, Any], ...]
HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>'\"&{{ 7*7 }}"


PART = {"base_part_bytes": 1}


def sections(*runs: Run, with_paper: bool = False) -> dict[str, Section]:
    return {section.id: section for section in sections_of(Page.of(runs, with_paper=with_paper))}


def blocks_of(*runs: Run, with_paper: bool = False) -> list[Block]:
    return [block for section in sections(*runs, with_paper=with_paper).values() for block in section.blocks]


def charts(*runs: Run, with_paper: bool = False) -> dict[str, Chart]:
    return {block.id: block for block in blocks_of(*runs, with_paper=with_paper) if isinstance(block, Chart)}


def words(*runs: Run) -> str:
    return " ".join(block.text for block in blocks_of(*runs) if isinstance(block, Text))


def nodes(spec: Any) -> Iterator[dict[str, Any]]:
    """Every object inside a specification."""
    if isinstance(spec, dict):
        yield spec
        spec = list(spec.values())
    if isinstance(spec, list):
        for inner in spec:
            yield from nodes(inner)


class Elements(HTMLParser):
    """The elements of a page, and the texts of its scripts."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        found = dict(attrs)
        self.ids += [str(found["id"])] if "id" in found else []
        self.links += [str(found[name]) for name in ("href", "src") if name in found]


def parsed(html: str) -> Elements:
    elements = Elements()
    elements.feed(html)
    return elements


def two_runs(make_run: Runs, rows: Rows) -> tuple[Run, Run]:
    return make_run(*rows, name="before", host="one"), make_run(*rows, name="after", host="two")


def test_a_full_run_has_every_section_and_chart(make_run: Runs, rows: Rows) -> None:
    run = make_run(*rows)
    assert list(sections(run)) == ["answer", "memory-table-section", "times", "parts", "predicted", "sure", "ran"]
    assert set(charts(run)) == {
        *(
            "costs",
            "latency",
            "parts-bars",
            "timeline-0",
            "memory-length",
            "memory-swept",
            "predicted-memory",
            "blocks-0",
        ),
        "blocks-0-others",
    }
    assert set(charts(*two_runs(make_run, rows), with_paper=True)) >= {"speedup", "figure-2", "timeline-1"}


def test_every_field_that_a_chart_encodes_is_in_its_data_or_calculated(make_run: Runs, rows: Rows) -> None:
    for runs in ((make_run(*rows),), two_runs(make_run, rows)):
        for chart in charts(*runs, with_paper=True).values():
            found = list(nodes(chart.spec))
            encoded = {node["field"] for node in found if isinstance(node.get("field"), str)}
            made = {str(node["as"]) for node in found if isinstance(node.get("as"), str)}
            columns = {name for frame in chart.data.values() for name in frame.columns}
            assert encoded <= columns | made, chart.id
            sources = {node["name"] for node in found if set(node) == {"name"}}
            assert sources == set(chart.data), chart.id


def test_every_quantitative_axis_has_a_title_in_its_chart(make_run: Runs, rows: Rows) -> None:
    for chart in charts(*two_runs(make_run, rows), with_paper=True).values():
        for axis in ("x", "y"):
            encodings = [n["encoding"][axis] for n in nodes(chart.spec) if axis in (n.get("encoding") or {})]
            if any(encoding.get("type") == "quantitative" for encoding in encodings):
                assert any(encoding.get("title") for encoding in encodings) or "title" in chart.spec, (chart.id, axis)


def test_every_switch_has_a_label_and_starts_at_one_of_its_options(make_run: Runs, rows: Rows) -> None:
    found = charts(*two_runs(make_run, rows), with_paper=True)
    switches = [node for chart in found.values() for node in chart.spec["params"] if isinstance(node.get("bind"), dict)]
    assert len(switches) >= 8
    for switch in switches:
        assert switch["value"] in switch["bind"]["options"]
        assert re.fullmatch(r"\w[\w ]*: ", switch["bind"]["name"])


def test_every_row_of_a_table_is_a_row_of_its_files(make_run: Runs, rows: Rows) -> None:
    tables = [block for block in blocks_of(*two_runs(make_run, rows), with_paper=True) if isinstance(block, Table)]
    files = [(table, file) for table in tables for file in table.downloads]
    assert len(files) >= 12
    for table, file in files:
        assert len(file.rows) == len(table.rows), file.name


@pytest.mark.parametrize(
    ("measure", "slope"),
    [
        ("seconds per sample", "2.00"),
        ("seconds per token", "1.00"),
        ("samples per second", "-2.00"),
        ("tokens per second", "-1.00"),
    ],
)
def test_the_slope_in_the_legend_is_that_of_the_measure(
    make_frame: Callable[..., pd.DataFrame], measure: str, slope: str
) -> None:
    frame = make_frame(*({"prompt_len": n, "completion_len": n, "total_s_per_sample": n**2} for n in (16, 32, 64)))
    found = slope_texts(frame)
    assert found[f"batch 1|total|{measure}|Hydra-PPO"] == f"slope {slope}"


def test_two_settings_of_a_method_have_a_slope_each(make_frame: Callable[..., pd.DataFrame]) -> None:
    frame = make_frame(
        *(
            {"prompt_len": n, "completion_len": n, "total_s_per_sample": n**power, "setting": setting}
            for setting, power in (("modern", 1), ("paper", 2))
            for n in (16, 32)
        )
    )
    assert slope_texts(frame)["batch 1|total|seconds per sample|Hydra-PPO"] == "slope 1.00 and 2.00"


def test_a_row_has_the_warnings_that_touch_its_numbers(make_run: Runs) -> None:
    disturbed = {"num_timed_blocks": 4, "num_disturbed_blocks": 2, "disturbed_by": "a backup"}
    run = make_run({}, disturbed, {"num_timed_blocks": 1, "num_prompts_truncated": 3}, {"outcome": "oom", "error": "x"})
    (table,) = (block for block in blocks_of(run) if isinstance(block, Table) and block.id == "memory-table")
    assert sorted(zip(table.kinds, table.titles, strict=True)) == [
        ("", ""),
        ("failed", "x"),
        ("warned", "2 of 4 blocks were disturbed: a backup."),
        ("warned", "One block: its times have no interval. 3 rows were longer than the case and cut."),
    ]


def test_the_last_column_is_ours_beside_the_papers_numbers(make_run: Runs) -> None:
    """A warning colours the last column."""
    papers = {"model": "llama-7b", "prompt_len": 400, "setting": "paper", "lora_rank": 128, "batch_size": 4}
    (table,) = (
        block
        for block in blocks_of(make_run({**papers, "num_timed_blocks": 1}))
        if isinstance(block, Table) and block.id == "memory-table"
    )
    assert list(table.headings[1:5]) == ["batch", "paper total GiB", "paper s/sample", "model GiB"]
    (cells,) = table.rows
    assert [cell.text for cell in cells[2:4]] == ["71.1", "6.47"]
    assert (table.headings[-1], cells[-1].text, table.kinds) == ("total s/sample", "1.00", ["warned"])


def test_drift_over_the_run_is_told(make_run: Runs, rows: Rows) -> None:
    said = words(make_run(*rows))
    assert "Drift: blocks became slower over the run, +9.5 % ± 0.0 from the first block to the last." in said
    assert "too few blocks to tell a drift" in words(make_run(*rows[:1]))


def test_ids_are_unique_and_every_link_stays_in_the_page(make_run: Runs, rows: Rows) -> None:
    found = parsed(page_html(Page.of(two_runs(make_run, rows), with_paper=True)))
    assert len(found.ids) == len(set(found.ids))
    assert found.links
    for link in found.links:
        assert link == "data:," or link.removeprefix("#") in found.ids, link


def test_method_colours_are_those_of_the_static_pictures(make_run: Runs, rows: Rows) -> None:
    scales = [
        node["scale"]
        for chart in charts(make_run(*rows)).values()
        for node in nodes(chart.spec)
        if node.get("field") == "title"
        and isinstance(node.get("scale"), dict)
        and "circle" not in node["scale"]["range"]
    ]
    assert scales
    for scale in scales:
        colors = dict(zip(scale["domain"], scale["range"], strict=True))
        assert colors["LoRA-PPO"] == "#D55E00"
        assert "'#000000'" in colors["PPO"]["expr"]


ODD: dict[str, tuple[dict[str, Any], ...]] = {
    "empty": (),
    "all failed": ({"outcome": "oom", "error": "no memory."}, {"outcome": "skipped", "method": "lora"}),
    "one case": ({},),
    "one length": ({}, {"method": "lora"}),
    "no numbers": (
        dict.fromkeys(("total_s_per_sample", "inference_s_per_sample", "update_s_per_sample")),
        {"prompt_len": 64, "model_bytes": 1, "activation_bytes": 0, "rollout_bytes": 0},
    ),
    "no times": ({"total_s_per_sample": None, "generate_phase_s": None}, {"outcome": "oom", "prompt_len": 64}),
    "an unknown method": ({"method": "gone", "family": None, "method_order": None},),
    "an unknown outcome": ({"outcome": "lost"}, {}),
    "many": tuple({"method": f"m{i}", "prompt_len": 2 ** (1 + i % 9), "batch_size": 1 + i % 5} for i in range(60)),
}


@pytest.mark.parametrize("bare", [True, False])
@pytest.mark.parametrize("kind", ODD)
def test_an_odd_run_gives_a_page(make_run: Runs, kind: str, bare: bool) -> None:
    html = page_html(Page.of([make_run(*ODD[kind], bare=bare)], with_paper=True))
    assert {"answer", "ran", *(["memory-table"] if ODD[kind] else [])} <= set(parsed(html).ids)


@pytest.mark.parametrize(
    ("first", "second"), list(itertools.combinations(("empty", "all failed", "one case", "many"), 2))
)
def test_odd_runs_are_compared(make_run: Runs, first: str, second: str) -> None:
    runs = [make_run(*ODD[kind], name=kind) for kind in (first, second)]
    html = page_html(Page.of(runs))
    told = "This run has no records yet." if first == "empty" else f"{second} and {first} have no timed case in common."
    assert "comparison" in parsed(html).ids or told in html


def test_odd_runs_say_what_is_missing(make_run: Runs) -> None:
    assert "This run has no records yet." in words(make_run())
    assert "No case was measured: 1 OOM, 1 SKIPPED." in words(make_run(*ODD["all failed"]))
    assert "how sure the times are is not known" in words(make_run({}, bare=True))
    assert "No environment is recorded." in words(make_run({}, bare=True))


def test_records_of_two_machines_are_warned_of(make_run: Runs) -> None:
    html = page_html(Page.of([make_run({"host": "one"}, {"host": "two", "prompt_len": 64})]))
    assert "Cases were measured on 2 machines (one, two): times are compared only between cases of one machine." in html


def test_environments_of_two_machines_are_compared(make_run: Runs, rows: Rows) -> None:
    tables = {block.id: block for block in blocks_of(*two_runs(make_run, rows)) if isinstance(block, Table)}
    assert [[cell.text for cell in row] for row in tables["differences"].rows] == [["host", "one", "two"]]


def test_a_resumed_run_is_described_by_all_its_segments(make_run: Runs) -> None:
    first: dict[str, Any] = {
        "started_at": "2026-01-02T03:04:05+00:00",
        "cpu": {"model": "AMD EPYC", "num_usable_cores": 2},
        "versions": {"rlhfbench": "0.1.0", "torch": "2.12.0"},
        "source": {"commit": "aaaaaaaaaaaaaaaa", "dirty": False},
    }
    second = {
        "started_at": "2026-01-03T03:04:05+00:00",
        "argv": ["rlhfbench", "run", "--resume", "a"],
        "cpu": {"model": "Intel Xeon", "num_usable_cores": 2},
        "versions": {"rlhfbench": "0.1.0", "torch": "2.13.0"},
        "source": {"commit": "bbbbbbbbbbbbbbbb", "dirty": True},
    }
    run = make_run({"run_segment": 0}, {"run_segment": 1, "prompt_len": 64}, **first)
    run = dataclasses.replace(run, environments=[*run.environments, {"host": "here", **second}])
    assert hardware_of(run) == ["AMD EPYC, 2 cores", "Intel Xeon, 2 cores"]
    assert facts(run) == (
        "2 cases measured · AMD EPYC, 2 cores · Intel Xeon, 2 cores · 2 January 2026, 03:04 UTC · rlhfbench 0.1.0 · "
        "torch 2.12.0 and 2.13.0 · commit aaaaaaaaaaaa and bbbbbbbbbbbb"
    )
    assert warnings(run) == [
        "The code had changes beside commit bbbbbbbbbbbb.",
        "The run was resumed 1 time, and its environment changed: cpu.model (AMD EPYC, Intel Xeon); versions.torch "
        "(2.12.0, 2.13.0); source.commit (aaaaaaaaaaaaaaaa, bbbbbbbbbbbbbbbb); source.dirty (False, True).",
    ]
    other = make_run({}, name="other", **first)
    rows = {row[0].text: [cell.text for cell in row[1:]] for row in differences((run, other)).rows}
    assert rows["versions.torch"] == ["2.12.0; 2.13.0", "2.12.0"]


def test_a_run_that_was_resumed_as_it_was_says_so(make_run: Runs) -> None:
    run = make_run({}, started_at="1")
    run = dataclasses.replace(run, environments=[*run.environments, {**run.environments[0], "started_at": "2"}])
    assert warnings(run) == ["The run was resumed 1 time, and its environment did not change."]


def test_a_value_that_became_empty_is_a_change_of_the_environment(make_run: Runs) -> None:
    run = make_run({}, gpus=[{"name": "A100"}], note="x")
    run = dataclasses.replace(run, environments=[*run.environments, {**run.environments[0], "gpus": [], "note": ""}])
    assert warnings(run) == [
        'The run was resumed 1 time, and its environment changed: gpus ({"name": "A100"}, none); note (x, empty).'
    ]


def test_the_hardware_of_a_case_on_a_cluster_is_that_of_its_node(make_run: Runs) -> None:
    def cpu(model: str) -> dict[str, Any]:
        return {"cpu": {"model": model, "num_usable_cores": 1}}

    run = make_run({"host": "a", "run_segment": 0}, {"host": "b", "run_segment": 1}, nodes={"a": cpu("x")})
    run = dataclasses.replace(run, environments=[*run.environments, {"nodes": {"a": cpu("y"), "b": cpu("z")}}])
    assert hardware_of(run) == ["x, 1 cores", "z, 1 cores"]


def test_hostile_text_is_escaped_everywhere(make_run: Runs, rows: Rows) -> None:
    hostile = {
        **dict.fromkeys(("model", "options", "method", "method_title", "family", "host", "error"), HOSTILE),
        **dict.fromkeys(("setting", "plan_error", "disturbed_by", "stopped_because"), HOSTILE),
    }
    failed = {**hostile, "prompt_len": 64, "outcome": "oom", "error": HOSTILE}
    plain = page_html(Page.of([make_run(*rows), make_run(*rows, name="other")], with_paper=True))
    run = make_run(*({**row, **hostile} for row in rows), failed, name=HOSTILE, argv=[HOSTILE])
    html = page_html(Page.of([run, make_run(*rows, name="other")], with_paper=True))
    assert "alert(1)" in html
    for tag in ("script", "img", "style"):
        assert parsed(html).tags.count(tag) == parsed(plain).tags.count(tag), tag
    assert not re.search(r"<img src=x|</script><script>alert", html)
    assert "49" not in re.findall(r"<h1>(.*?)</h1>", html)[0]


def test_a_line_below_the_title_says_what_was_measured_on_what_and_by_what(make_run: Runs) -> None:
    environment = {
        "started_at": "2026-01-02T03:04:05+00:00",
        "cpu": {"model": "AMD EPYC", "num_usable_cores": 2},
        "versions": {"rlhfbench": "0.1.0", "torch": "2.13.0", "peft": None},
        "source": {"commit": "0123456789abcdef", "dirty": True},
    }
    run = make_run({}, {"outcome": "oom", "error": "x"}, **environment)
    assert facts(run) == (
        "1 of 2 cases measured · AMD EPYC, 2 cores · 2 January 2026, 03:04 UTC · rlhfbench 0.1.0 · torch 2.13.0 · "
        "commit 0123456789ab"
    )
    assert facts(make_run({}, bare=True)) == "1 case measured"
    odd = make_run({}, started_at=[], cpu="none", versions=3, source=None)
    assert facts(odd) == "1 case measured"


def test_the_weights_that_methods_load_are_told_in_their_order(make_run: Runs) -> None:
    rows = (
        {"method": "hydra", "loads": "1 model, 2 LoRA sets"},
        {"method": "full", "loads": "4 models"},
        {"method": "x"},
    )
    measured = tuple({**row, "base_part_bytes": 2**30} for row in rows)
    assert "What each method loads: PPO, 4 models; Hydra-PPO, 1 model, 2 LoRA sets." in words(make_run(*measured))
    assert "What each method loads" not in words(make_run(*measured[2:]))


def test_the_page_of_several_runs_begins_with_what_they_differ_by(make_run: Runs, rows: Rows) -> None:
    first, *_ = sections(make_run(*rows, name="before"), make_run(*rows, name="after"))["answer"].blocks
    assert isinstance(first, Text)
    assert first.kind == "answer"
    assert first.text.startswith("Of 12 cases that both have, after is faster than before in 0")


def test_the_comparison_with_the_papers_names_its_run_among_several(make_run: Runs, rows: Rows) -> None:
    runs = two_runs(make_run, rows)
    assert sections(*runs, with_paper=True)["paper"].title == "Comparison with the papers, before"
    assert sections(runs[0], with_paper=True)["paper"].title == "Comparison with the papers"


def test_a_predicted_timeline_stands_behind_the_measured_one(make_run: Runs) -> None:
    run = make_run({"base_part_bytes": 2**30})
    (case_id,) = run.timelines
    chart = charts(dataclasses.replace(run, predicted_timelines={case_id: run.timelines[case_id]}))["timeline-0"]
    (switch,) = (param for param in chart.spec["params"] if isinstance(param.get("bind"), dict))
    case = "Hydra-PPO, 64 tokens, batch 1"
    assert (switch["value"], switch["bind"]["options"]) == (case, [case, f"{case}, predicted"])
    assert chart.caption.endswith("it leaves out most decode steps.")


def test_one_length_is_a_bar_a_method_and_no_line_against_length(make_run: Runs) -> None:
    failed = {"method": "full", "outcome": "oom", "error": "out of memory."}
    found = charts(make_run({"method": "lora", **PART}, {"batch_size": 2, **PART}, failed))
    assert "parts-bars" in found
    assert "memory-length" not in found
    latency = found["latency"]
    assert latency.title == "Time at 64 tokens"
    assert "slope" not in latency.caption
    assert latency.caption.endswith("has its outcome in place of a bar.")
    assert set(latency.data["failures"]["word"]) == {"OOM"}
    assert {p["name"] for p in latency.spec["params"] if "bind" in p} == {"panel", "kind", "measure"}
    assert {n["mark"]["type"] for n in nodes(latency.spec) if isinstance(n.get("mark"), dict)} == {
        "bar",
        "rule",
        "text",
    }


def test_words_stand_beyond_the_interval_of_every_measure(make_run: Runs) -> None:
    """The upper end of a throughput is that of the lower time."""
    found = list(nodes(charts(make_run({"method": "lora"}, {}))["latency"].spec))
    assert [node["calculate"] for node in found if node.get("as") == "end"] == ["max(datum.low, datum.high)"]
    encodings = [node["encoding"] for node in found if "encoding" in node]
    assert [each["x"]["field"] for each in encodings if each.get("text", {}).get("field") == "words"] == ["end"]


def test_memory_against_one_number_has_its_name_on_the_axis(make_run: Runs) -> None:
    one = charts(make_run(*({"lora_rank": rank, **PART} for rank in (8, 16))))["memory-swept"].spec
    assert {n["x"]["title"] for n in nodes(one) if "x" in n and "title" in n["x"]} == {"LoRA rank"}
    assert one["title"]["text"] == "GiB"
    rows = [{**PART, "lora_rank": rank, "options": f"ppo.num_ppo_epochs={num}"} for rank in (8, 16) for num in (1, 2)]
    several = charts(make_run(*rows))["memory-swept"].spec
    assert several["title"]["text"] == {"expr": "'GiB, against ' + axis"}


def test_memory_against_an_option_says_that_its_usual_value_is_left_out(make_run: Runs) -> None:
    left_out = "A case is left out where the option has the value of its setting"
    ranks = charts(make_run(*({"lora_rank": rank, **PART} for rank in (8, 16))))["memory-swept"]
    assert left_out not in ranks.caption
    rows = [{**PART, "options": options} for options in ("", "ppo.num_ppo_epochs=2", "ppo.num_ppo_epochs=4")]
    epochs = charts(make_run(*rows))["memory-swept"]
    assert left_out in epochs.caption
    assert epochs.data["swept"]["value"].tolist() == [2, 4]


def test_a_run_without_records_has_no_table(make_run: Runs) -> None:
    assert list(sections(make_run())) == ["answer", "ran"]


def test_one_reason_why_timing_ended_is_no_list(make_run: Runs) -> None:
    precise, budget = {"stopped_because": "precise"}, {"stopped_because": "budget"}
    assert "Timing of 2 cases ended because the interquartile mean was precise enough." in words(
        make_run(precise, precise)
    )
    both = words(make_run(precise, budget))
    assert "ended: 1 because the interquartile mean was precise enough, 1 because the time budget was spent." in both


def test_points_at_lengths_that_no_panel_shares_are_bars_with_their_lengths(make_run: Runs) -> None:
    found = charts(make_run({"model": "a", **PART}, {"model": "b", "prompt_len": 64, **PART}))
    assert "parts-bars" in found
    assert "memory-length" not in found
    assert found["latency"].title == "Time of each method"
    assert "datum.seq_len + ' tokens'" in str(found["latency"].spec)
