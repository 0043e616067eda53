"""The section on several ranks."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import pandas as pd

from rlhfreports.page.blocks import Chart, Table
from rlhfreports.page.data import Page, Run
from rlhfreports.page.ranks import ranks_section
from rlhfreports.page.render import page_html

GIB = 2**30
Runs = Callable[..., Run]
Ranked = Callable[..., dict[str, Any]]
HOW: tuple[dict[str, Any], ...] = ({"parallel": "ddp"}, {"parallel": "deepspeed", "zero_stage": 3})


def with_ranks(run: Run) -> Run:
    rows = [
        {"case_id": case_id, "rank": rank, "host": "one", "device": "cpu", "total_bytes": GIB, "base_part_bytes": GIB}
        | {"communication_step_s": 2.0, "waiting_s": 0.5 * rank}
        for case_id in run.frame["case_id"]
        for rank in range(2)
    ]
    return dataclasses.replace(run, ranks=pd.DataFrame(rows))


def many(make_run: Runs, ranked: Ranked, **more: Any) -> Run:
    rows = [ranked(size, 4, 1.0 / size, method=m, **how) for m in ("lora", "hydra") for how in HOW for size in (1, 2)]
    rows.append(ranked(2, 4, 1.0, parallel="fsdp", outcome="oom", error="no memory.", total_s_per_sample=None))
    return with_ranks(make_run(*rows, **more))


def test_a_run_without_ranks_has_no_such_section(make_run: Runs) -> None:
    assert ranks_section(Page.of([make_run({}, {"batch_size": 2})])) is None


def test_the_section_has_charts_and_tables(make_run: Runs, ranked: Ranked) -> None:
    run = many(make_run, ranked)
    section = ranks_section(Page.of([run]))
    assert section is not None
    blocks = {block.id: block for block in section.blocks if isinstance(block, (Chart, Table))}
    assert list(blocks) == ["strategies", "ranks-table", "scaling", "scaling-table", "each-rank-0"]
    strategies = blocks["strategies"]
    assert isinstance(strategies, Chart)
    switches = {p["name"]: p["bind"]["options"] for p in strategies.spec["params"] if "bind" in p}
    assert switches == {
        "what": ["GiB by part", "seconds"],
        "at": ["1 rank, 64 tokens, batch 4", "2 ranks, 64 tokens, batch 4"],
        "method": ["LoRA-PPO", "Hydra-PPO"],
    }
    assert strategies.data["strategies-failed"]["word"].tolist() == ["OOM"]
    scaling = blocks["scaling"]
    assert isinstance(scaling, Chart)
    measures = next(p for p in scaling.spec["params"] if p["name"] == "measure")["bind"]["options"]
    assert measures[3:] == ["GiB of the worst rank", "waiting (% of a step)", "imbalance (%)"]


def test_measures_that_no_case_has_are_no_options(make_run: Runs, ranked: Ranked) -> None:
    rows = [ranked(size, 4, 1.0, waiting_share=None, imbalance=None) for size in (1, 2)]
    section = ranks_section(Page.of([make_run(*rows)]))
    assert section is not None
    (scaling,) = (block for block in section.blocks if isinstance(block, Chart) and block.id == "scaling")
    measures = next(p for p in scaling.spec["params"] if p["name"] == "measure")["bind"]["options"]
    assert measures[-1] == "GiB of the worst rank"


def test_runs_over_ranks_are_shown_together(make_run: Runs, ranked: Ranked) -> None:
    runs = [many(make_run, ranked, name=name) for name in ("before", "after")]
    page = Page.of(runs)
    section = ranks_section(page)
    assert section is not None
    charts = {block.id: block for block in section.blocks if isinstance(block, Chart)}
    assert list(charts) == ["strategies", "scaling", "each-rank-0", "each-rank-1"]
    labels = list(dict.fromkeys(charts["strategies"].data["strategies"]["label"]))
    assert labels == ["DDP, before", "DDP, after", "ZeRO-3, before", "ZeRO-3, after"]
    assert "Over several ranks" in page_html(page)


def test_text_of_a_record_over_ranks_is_escaped(make_run: Runs, ranked: Ranked) -> None:
    hostile = "</script><script>alert(1)</script>"
    words = dict.fromkeys(("host", "device", "error", "method_title"), hostile)
    rows = [ranked(size, 4, 1.0, parallel=hostile, **words) for size in (1, 2)]
    run = with_ranks(make_run(*rows))
    run = dataclasses.replace(run, ranks=run.ranks.assign(host=[hostile, "one"] * 2, device=hostile))
    html = page_html(Page.of([run]))
    assert "alert(1)" in html
    assert hostile not in html


def test_no_measured_case_over_ranks_leaves_the_table(make_run: Runs, ranked: Ranked) -> None:
    section = ranks_section(Page.of([make_run(ranked(2, 4, 1.0, outcome="oom", total_s_per_sample=None))]))
    assert section is not None
    assert [block.id for block in section.blocks if isinstance(block, (Chart, Table))] == ["ranks-table"]


def test_plans_of_more_ranks_stand_beside_a_run(make_run: Runs, ranked: Ranked) -> None:
    run = make_run(*(ranked(size, 4, 1.0) for size in (1, 2)))
    plans = make_run(*(ranked(size, 4, 1.0, outcome=None, total_bytes=2 * GIB) for size in (2, 8))).frame
    section = ranks_section(Page.of([run], plans=plans))
    assert section is not None
    blocks = {block.id: block for block in section.blocks if isinstance(block, (Chart, Table))}
    assert list(blocks)[-2:] == ["planned-ranks", "planned-ranks-table"]
    chart, table = blocks["planned-ranks"], blocks["planned-ranks-table"]
    assert isinstance(chart, Chart)
    assert isinstance(table, Table)
    assert chart.data["planned-ranks"]["world_size"].tolist() == [2, 8]
    assert [[cell.text for cell in row[-4:]] for row in table.rows] == [
        ["2", "2.00", "1.50", "+33.33"],
        ["8", "2.00", "–", "–"],
    ]
    assert "Planned memory of more ranks" in page_html(Page.of([run], plans=plans))


def test_a_legend_has_the_pieces_of_what_is_shown(make_run: Runs, ranked: Ranked) -> None:
    section = ranks_section(Page.of([many(make_run, ranked)]))
    assert section is not None
    charts = {block.id: block for block in section.blocks if isinstance(block, Chart)}
    for name in ("strategies", "each-rank-0"):
        values = [color["legend"]["values"] for color in colors(charts[name].spec)]
        parts = ["base", "activations"] if name == "strategies" else ["base"]
        pieces = {"GiB by part": parts, "seconds": ["at work", "waiting"]}
        assert values == [{"expr": f"({json.dumps(pieces)})[what]"}]


def colors(spec: Any) -> list[Any]:
    """The colours of a specification that have a legend of their own."""
    layers = [layer["encoding"] for layer in spec["layer"]]
    return [encoding["color"] for encoding in layers if "legend" in encoding.get("color", {})]
