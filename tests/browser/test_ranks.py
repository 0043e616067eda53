"""The section on several ranks in a real browser."""

from __future__ import annotations

from typing import Any

import pytest

_WAIT_MS = 30_000
pytestmark = pytest.mark.parametrize("opened", ["ranks"], indirect=True, scope="module")


def texts(page: Any, chart: str) -> list[str]:
    """Every word in a chart."""
    found: list[str] = page.locator(f"[data-chart='{chart}'] svg text").evaluate_all(
        "all => all.map(t => t.textContent)"
    )
    return found


def legend(page: Any) -> list[str]:
    """The words of the legend of the strategies."""
    found: list[str] = page.locator("[data-chart='strategies'] svg .role-legend-label text").all_text_contents()
    return found


def wait_for_text(page: Any, chart: str, text: str) -> None:
    page.locator(f"[data-chart='{chart}'] svg text", has_text=text).first.wait_for(timeout=_WAIT_MS)


def test_the_navigation_leads_to_the_section(page: Any) -> None:
    page.get_by_role("navigation").get_by_role("link", name="Over several ranks").click()
    in_sight = "() => Math.abs(document.querySelector('#ranks').getBoundingClientRect().top) < 300"
    page.wait_for_function(in_sight, timeout=_WAIT_MS)


def test_the_strategies_of_a_method_are_bars_with_their_totals(page: Any) -> None:
    figure = page.locator("figure:has([data-chart='strategies'])")
    figure.get_by_label("PPO", exact=True).check()
    wait_for_text(page, "strategies", "FSDP")
    found = texts(page, "strategies")
    assert {"DDP", "ZeRO-0", "ZeRO-1", "ZeRO-2", "ZeRO-3", "FSDP", "optimizer"} <= set(found)
    assert len([text for text in found if " GiB, " in text]) == 6
    assert "OOM" not in found
    figure.get_by_label("DPO", exact=True).check()
    wait_for_text(page, "strategies", "OOM")
    figure.get_by_label("PPO", exact=True).check()
    page.locator("[data-chart='strategies'] svg text", has_text="OOM").wait_for(state="detached", timeout=_WAIT_MS)


def test_seconds_are_divided_into_work_and_waiting(page: Any) -> None:
    figure = page.locator("figure:has([data-chart='strategies'])")
    figure.get_by_label("seconds", exact=True).check()
    wait_for_text(page, "strategies", "% waiting")
    assert legend(page) == ["at work", "waiting"]
    figure.get_by_label("GiB by part", exact=True).check()
    wait_for_text(page, "strategies", " GiB, ")
    assert "waiting" not in legend(page)
    assert {"base", "optimizer"} <= set(legend(page))


def test_every_rank_of_a_case_has_a_bar(page: Any) -> None:
    assert {"rank 0, cpu", "rank 1, cpu"} <= set(texts(page, "each-rank-0"))


def test_the_table_of_ranks_is_filtered_by_strategy(page: Any) -> None:
    rows = page.locator("#ranks-table tbody tr")
    assert rows.count() == 24
    head = page.locator("#ranks-table_wrapper .dt-scroll-head")
    head.get_by_role("button", name="Filter ranks share by").click()
    page.locator(".dtcc-list-buttons").get_by_label("ZeRO-3", exact=True).click()
    page.wait_for_function("() => document.querySelectorAll('#ranks-table tbody tr').length === 4", timeout=_WAIT_MS)
    page.locator(".dtcc-list-selectNone").click()
    page.keyboard.press("Escape")
