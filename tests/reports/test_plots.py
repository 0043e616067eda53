from __future__ import annotations

import itertools
import math
import subprocess
import sys
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from rlhfreports.plots import latency, latency_figure, throughput, throughput_figure
from rlhfreports.styles import COLORS, MARKERS, method_styles


def visible(figure: Figure) -> list:
    return [axes for axes in figure.axes if axes.get_visible()]


def lines(axes) -> dict[str, object]:
    """The methods' lines, without the markers of the band."""
    return {line.get_label(): line for line in axes.lines if not line.get_label().startswith("_")}


def words(axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


def legend_labels(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


@pytest.fixture
def frame(make_frame):
    seconds = {"full": 4.0, "lora": 2.0, "hydra": 1.0}
    return make_frame(
        *(
            {"method": m, "prompt_len": n, "batch_size": b, "total_s_per_sample": s * n / b}
            for b in (1, 4)
            for n in (32, 64, 128)
            for m, s in seconds.items()
        )
    )


def test_latency_has_one_line_per_method(frame):
    one, four = visible(latency_figure(frame))
    assert (one.get_title(), four.get_title()) == ("batch 1", "batch 4")
    assert list(lines(one)) == ["PPO", "LoRA-PPO", "Hydra-PPO"]
    assert lines(one)["LoRA-PPO"].get_xdata().tolist() == [64, 128, 256]
    assert lines(one)["LoRA-PPO"].get_ydata().tolist() == [64.0, 128.0, 256.0]
    assert lines(four)["PPO"].get_ydata().tolist() == [32.0, 64.0, 128.0]


def test_of_many_batch_sizes_a_picture_draws_nine_and_says_so(make_frame):
    sizes = range(1, 31)
    frame = make_frame(*({"batch_size": b, "outcome": "oom" if b == 1 else "ok"} for b in sizes))
    figure = latency_figure(frame)
    titles = [axes.get_title() for axes in visible(figure)]
    assert len(titles) == 9
    assert (titles[0], titles[-1]) == ("batch 2", "batch 30")  # nothing was measured at 1
    assert any("9 of 30 panels: the page has all" in text.get_text() for text in figure.texts)
    few = latency_figure(frame[frame["batch_size"] <= 9])
    assert len(visible(few)) == 9
    assert not any("panels" in text.get_text() for text in few.texts)


def test_many_batch_sizes_without_a_measurement_are_counted(make_frame):
    figure = latency_figure(make_frame(*({"batch_size": b, "outcome": "oom"} for b in range(1, 31))))
    assert visible(figure) == []
    assert any("No case was measured: 30 OOM" in text.get_text() for text in figure.texts)


def both_settings(make_frame, *, oom=()):
    return make_frame(
        *(
            {"method": m, "prompt_len": n, "setting": s, "outcome": "oom" if (m, n, s) in oom else "ok"}
            for s in ("paper", "modern")
            for n in (32, 64)
            for m in ("lora", "hydra")
        )
    )


def test_the_settings_of_a_method_share_its_colour_and_not_its_line_style(make_frame):
    figure = latency_figure(both_settings(make_frame))
    (axes,) = visible(figure)
    drawn = lines(axes)
    titles = [f"{m}, {s}" for m in ("LoRA-PPO", "Hydra-PPO") for s in ("modern", "paper")]
    assert list(drawn) == titles
    assert [drawn[title].get_linestyle() for title in titles] == ["-", "--", "-", "--"]
    colors = [drawn[title].get_color() for title in titles]
    assert colors[0] == colors[1] != colors[2] == colors[3]
    assert legend_labels(figure) == ["LoRA-PPO", "Hydra-PPO", "modern", "paper"]


def test_each_setting_has_its_own_row_of_words(make_frame):
    oom = {("lora", 64, "paper"), ("lora", 64, "modern"), ("hydra", 64, "paper")}
    (axes,) = visible(latency_figure(both_settings(make_frame, oom=oom)))
    assert words(axes) == ["OOM"] * 3
    assert len({text.get_position()[1] for text in axes.texts}) == 3


def test_a_single_setting_is_a_solid_line_named_by_the_method(make_frame):
    frame = make_frame(*({"prompt_len": n, "setting": "paper"} for n in (32, 64)))
    (axes,) = visible(latency_figure(frame))
    assert {name: line.get_linestyle() for name, line in lines(axes).items()} == {"Hydra-PPO": "-"}


def test_throughput_shows_samples_and_tokens(frame):
    samples_1, _, tokens_1, tokens_4 = visible(throughput_figure(frame))
    assert samples_1.get_ylabel().startswith("samples per second")
    assert tokens_1.get_ylabel().startswith("tokens per second")
    assert lines(samples_1)["Hydra-PPO"].get_ydata().tolist() == [1 / 32, 1 / 64, 1 / 128]
    assert lines(tokens_4)["Hydra-PPO"].get_ydata().tolist() == [8.0, 8.0, 8.0]


@pytest.mark.parametrize("draw", [latency_figure, throughput_figure])
def test_both_axes_are_logarithmic_with_plain_numbers_and_no_minor_ticks(frame, draw):
    for axes in visible(draw(frame)):
        assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
        assert axes.get_xticks().tolist() == [64, 128, 256]
        assert [axes.xaxis.get_major_formatter()(x) for x in axes.get_xticks()] == ["64", "128", "256"]
        assert axes.get_xticks(minor=True).size == axes.get_yticks(minor=True).size == 0
        bottom, top = axes.get_ylim()
        assert len([tick for tick in axes.get_yticks() if bottom <= tick <= top]) >= 3


def test_panels_of_one_quantity_have_the_same_limits(frame):
    one, four = visible(latency_figure(frame))
    assert one.get_ylim() == four.get_ylim()
    assert one.get_xlim() == four.get_xlim()


def test_the_figure_has_title_caption_and_legend(frame):
    figure = latency_figure(frame)
    said = [text.get_text() for text in figure.texts]
    assert said == ["Seconds per sample against sequence length", "tiny · cpu · float32 · LoRA rank 16"]
    assert legend_labels(figure) == ["PPO", "LoRA-PPO", "Hydra-PPO"]


def test_colour_and_marker_of_a_method_do_not_depend_on_other_methods(make_frame):
    def look(*methods: str) -> tuple[str, str]:
        (axes,) = visible(latency_figure(make_frame(*({"method": method} for method in methods))))
        line = lines(axes)["Hydra-PPO"]
        return line.get_color(), line.get_marker()

    assert look("hydra") == look("full", "lora", "hydra") == look("mine", "hydra") == (COLORS[4], MARKERS[4])


def test_unlisted_methods_have_looks_of_their_own(make_frame):
    names = ["full", "mine", "hydra", "yours", "lora"]
    (axes,) = visible(latency_figure(make_frame(*({"method": name} for name in names))))
    looks = {(line.get_color(), line.get_marker()) for line in lines(axes).values()}
    assert len(looks) == len(names)


def test_colours_and_markers_are_all_different():
    assert len(set(COLORS)) == len(COLORS) >= 12
    assert len(set(MARKERS)) == len(MARKERS) == len(COLORS)


# Of linear RGB, full strength: Machado, Oliveira and Fernandes 2009, table 1.
VISION = {
    "normal": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}
# Linear RGB to cone responses, and their cube roots to OKLab: Ottosson 2020.
TO_CONES = [
    [0.41222147, 0.53633254, 0.05144599],
    [0.21190350, 0.68069955, 0.10739696],
    [0.08830246, 0.28171884, 0.62997870],
]
TO_OKLAB = [
    [0.21045426, 0.79361779, -0.00407205],
    [1.97799850, -2.42859221, 0.45059371],
    [0.02590404, 0.78277177, -0.80867577],
]


@pytest.mark.parametrize("vision", VISION)
def test_every_colour_vision_tells_the_colours_apart(vision):
    encoded = np.array([matplotlib.colors.to_rgb(color) for color in COLORS])
    linear = np.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4)
    seen = np.clip(linear @ np.array(VISION[vision]).T, 0, 1)
    places = np.cbrt(seen @ np.array(TO_CONES).T) @ np.array(TO_OKLAB).T
    distances = {
        (COLORS[i], COLORS[j]): float(np.linalg.norm(places[i] - places[j]))
        for i, j in itertools.combinations(range(len(COLORS)), 2)
    }
    # The least distance within Okabe and Ito's palette is 0.076.
    assert min(distances.values()) > 0.075, min(distances, key=distances.get)


def many_methods(make_frame, num_methods, **row):
    return make_frame(
        *(
            {"method": f"method-{i:02}", "method_order": i, "prompt_len": n, **row}
            for i in range(num_methods)
            for n in (32, 64)
        )
    )


def test_thirty_methods_have_thirty_looks(make_frame):
    looks = {name: (s.color, s.marker) for name, s in method_styles(many_methods(make_frame, 30)).items()}
    assert len(set(looks.values())) == 30
    assert looks["method-04"] == (COLORS[4], MARKERS[4])


@pytest.mark.parametrize("num_methods", [5, 14])
def test_a_long_legend_fits_the_figure(make_frame, num_methods):
    figure = latency_figure(many_methods(make_frame, num_methods))
    figure.draw_without_rendering()
    legend = figure.legends[0].get_window_extent()
    (axes,) = visible(figure)
    assert legend.x0 >= 0
    assert legend.x1 <= figure.bbox.x1
    assert legend.y0 >= axes.get_tightbbox().y1


def test_words_take_at_most_half_of_a_panel(make_frame):
    failing = many_methods(make_frame, 30, outcome="oom")
    (axes,) = visible(latency_figure(pd.concat([make_frame({}), failing], ignore_index=True)))
    assert len(words(axes)) == 60
    assert min(text.get_position()[1] for text in axes.texts) >= 0.5


def test_methods_without_a_phase_are_drawn_by_their_total(make_frame, other_shapes):
    (axes,) = visible(latency_figure(make_frame({}, *other_shapes)))
    assert set(lines(axes)) == {"Hydra-PPO", "sft", "dpo", "best-of-n"}
    _, tokens = visible(throughput_figure(make_frame({}, *other_shapes)))
    assert {name: line.get_ydata().tolist() for name, line in lines(tokens).items()} == {
        "Hydra-PPO": [64.0], "sft": [64.0], "dpo": [128.0], "best-of-n": [256.0],
    }  # fmt: skip


def test_outcomes_of_unmeasured_cases_stand_above_the_lines(make_frame):
    frame = make_frame(
        {"method": "full", "prompt_len": 32},
        {"method": "full", "prompt_len": 64, "outcome": "oom"},
        {"method": "full", "prompt_len": 128, "outcome": "skipped"},
        {"method": "hydra", "prompt_len": 32},
        {"method": "hydra", "prompt_len": 64, "total_s_per_sample": 90.0},
        {"method": "hydra", "prompt_len": 128, "outcome": "crashed"},
    )
    (axes,) = visible(latency_figure(frame))
    marks = {(text.get_text(), text.get_position()[0], text.get_color()) for text in axes.texts}
    assert marks == {
        ("OOM", 128, COLORS[0]),
        ("SKIPPED", 256, COLORS[0]),
        ("CRASHED", 256, COLORS[4]),
    }
    # No point stands in the band that the words stand in.
    lowest_word = min(text.get_position()[1] for text in axes.texts)
    bottom, top = axes.get_ylim()
    highest_point = math.log(90.0 / bottom) / math.log(top / bottom)
    assert highest_point < lowest_word


def test_an_ok_case_without_a_time_is_marked(make_frame):
    frame = make_frame({"prompt_len": 32}, {"prompt_len": 64, "total_s_per_sample": None})
    (axes,) = visible(latency_figure(frame))
    assert words(axes) == ["no time"]


def test_the_largest_batch_that_fits_is_written_above_its_point(make_frame):
    frame = make_frame(
        {"prompt_len": 32, "batch_size": 1},
        {"prompt_len": 64, "batch_size": 1, "total_s_per_sample": 3.0},
        {"prompt_len": 32, "batch_size": 8, "total_s_per_sample": 0.5},
        {"prompt_len": 64, "batch_size": 8, "outcome": "oom"},
    )
    *_, last = visible(latency_figure(frame))
    assert lines(last)["Hydra-PPO"].get_ydata().tolist() == [0.5, 3.0]
    assert {(text.get_text(), text.get_position()[0]) for text in last.texts} == {("batch 8", 64), ("batch 1", 128)}


def test_close_lengths_get_short_words(make_frame):
    rows = [{"prompt_len": n} for n in range(64, 200, 4)]
    (axes,) = visible(latency_figure(make_frame(*rows[:-1], {"prompt_len": 200, "outcome": "oom"})))
    assert words(axes) == ["×"]
    assert len(axes.get_xticks()) < len(rows) / 2
    assert axes.get_xticks()[-1] == 400


@pytest.mark.parametrize("draw", [latency_figure, throughput_figure])
def test_a_single_case_is_a_point(make_frame, draw):
    for axes in visible(draw(make_frame({}))):
        assert lines(axes)["Hydra-PPO"].get_xdata().tolist() == [64]
        low, high = axes.get_xlim()
        assert low < 64 < high


def test_without_measurements_the_figure_counts_outcomes(make_frame, tmp_path):
    frame = make_frame(
        {"outcome": "oom"}, {"method": "full", "outcome": "oom"}, {"outcome": "crashed", "batch_size": 2}
    )
    figure = latency_figure(frame)
    assert "No case was measured: 2 OOM, 1 CRASHED." in [text.get_text() for text in figure.texts]
    assert all(path.stat().st_size > 0 for path in throughput(make_frame(), tmp_path / "none"))


def test_png_and_svg_are_written(frame, tmp_path):
    png, svg = latency(frame, tmp_path / "v1.2-latency")
    assert (png.name, svg.name) == ("v1.2-latency.png", "v1.2-latency.svg")
    assert png.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert ElementTree.parse(svg).getroot().tag.endswith("svg")


def test_the_files_depend_on_the_frame_alone(frame, tmp_path):
    with matplotlib.rc_context(
        {"font.size": 20.0, "figure.facecolor": "red", "path.simplify": False, "xtick.labelsize": 3}
    ):
        first = latency(frame, tmp_path / "first")
    second = latency(frame, tmp_path / "second")
    for one, other in zip(first, second, strict=True):
        assert one.read_bytes() == other.read_bytes()
    assert "<dc:date>" not in second[1].read_text()


def test_drawing_does_not_change_rcparams(frame, tmp_path):
    before = dict(matplotlib.rcParams)
    latency(frame, tmp_path / "latency")
    assert dict(matplotlib.rcParams) == before


def test_pyplot_is_never_imported():
    code = "import sys, rlhfreports.plots; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
