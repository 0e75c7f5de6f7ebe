"""The Pareto plot: one well-formed, stand-alone SVG file that shows every network and the front."""

import math
import re
import xml.etree.ElementTree as ET
from itertools import pairwise

import pytest

from kdpipe.pipeline.report.networks import STYLES, style_of
from kdpipe.pipeline.report.pareto import PANEL_WIDTH, RIGHT, Point, pareto_front, pareto_panels, pareto_svg
from kdpipe.stages.evaluation.intervals import Interval

SVG = "{http://www.w3.org/2000/svg}"


def around(accuracy, half=0.5):
    return Interval(accuracy - half, accuracy + half, "images")


USUAL = (
    Point("teacher", 97.2, None, 2_000_000, 9.0, "teacher"),
    Point("student alone", 91.0, around(91.0), 400_000, 1.5, "alone"),
    Point("student distilled", 93.5, around(93.5), 400_000, 1.5, "student"),
    Point("pruned", 92.0, around(92.0), 150_000, 0.8, "pruned"),
    Point("int8", 93.4, around(93.4), 110_000, 0.5, "int8-unpruned"),
    Point("pruned int8", 91.5, around(91.5), 45_000, 0.25, "int8"),
)


def marks(root):
    """Return (x, y, style, form) of each marker, in drawing order: those of the points, then those of their names."""
    forms = {one.get("id"): one.get("d") for one in root.iter(f"{SVG}path") if one.get("id")}
    return [
        (float(one.get("x")), float(one.get("y")), one.get("style"), forms[one.get("href").removeprefix("#")])
        for one in root.iter(f"{SVG}use")
    ]


def dots(root):
    """Return (x, y, is on the front) of each point's marker, in drawing order."""
    is_name = [x % PANEL_WIDTH > RIGHT for x, *_ in marks(root)]
    found = [mark for mark, names in zip(marks(root), is_name, strict=True) if not names]
    assert sum(is_name) == len(found)
    return [(x, y, "fill: var(--paper)" not in style) for x, y, style, _ in found]


def texts(root):
    return [text.text for text in root.iter(f"{SVG}text")]


def height(text):
    """Return the baseline of a text element in user units."""
    return float(text.get("y") or re.search(r"translate\(\S+ (\S+)\)", text.get("transform"))[1])


def drawn(points, title="A run"):
    return ET.fromstring(pareto_svg(points, title=title))


def test_every_network_is_in_both_panels_and_the_front_is_filled():
    root = drawn(USUAL)
    on_front = {"teacher", "student distilled", "int8", "pruned int8"}
    assert [is_filled for _, _, is_filled in dots(root)] == [point.name in on_front for point in USUAL] * 2
    assert all(texts(root).count(point.name) == 2 for point in USUAL)


def test_each_network_has_its_own_color_and_mark():
    found = marks(drawn(USUAL))
    assert (
        len({form for *_, form in found}) == len({re.search("stroke: [^;]*", one[2])[0] for one in found}) == len(USUAL)
    )
    kinds = ("teacher", "alone", "student", "pruned", "int8", "int8-unpruned", "int8-ptq", "member", "ensemble")
    assert len({style_of(kind) for kind in kinds}) == len(STYLES)
    assert style_of("int4-unpruned-alone").color == style_of("int8-unpruned").color
    assert style_of("pruned-alone").line != style_of("pruned").line


def test_far_teacher_leaves_the_students_apart():
    students = [Point(str(accuracy), accuracy, None, 1000, 1.0) for accuracy in (97.0, 98.0)]
    _, low, high = (y for _, y, _ in dots(drawn([Point("teacher", 60.0, None, 10**6, 9.0), *students]))[:3])
    assert low - high > 25  # 6 % of the panel on a linear axis: 12 units


def test_bars_are_the_intervals():
    text = pareto_svg(
        [Point("a", 90.0, None, 1, None, "teacher"), Point("b", 80.0, around(80.0, 5), 2, None)], title=""
    )
    pattern = r'M (\S+) (\S+)\s+L \1 (\S+)\s+" style="[^"]*stroke: var\(--student\)'
    ((_, low, high),) = re.findall(pattern, text)
    (_, dot, _) = dots(ET.fromstring(text))[1]
    share = math.log(25 / 20) / math.log(25 / 15)  # the axis is logarithmic in the error
    assert (float(low) - dot) / (float(low) - float(high)) == pytest.approx(share, abs=1e-3)


def test_front_leaves_out_dominated_points():
    def names(*pairs):
        costs = [(Point(str(number), accuracy, None, 1, None), cost) for number, (cost, accuracy) in enumerate(pairs)]
        return [point.name for point, _ in pareto_front(costs)]

    assert names((3, 90), (1, 70), (2, 80)) == ["1", "2", "0"]
    assert names((3, 90), (1, 90)) == ["1"]  # as accurate for less
    assert names((1, 70), (1, 90)) == ["1"]  # more accurate for the same
    assert names((1, 70), (1, 70), (2, 60)) == ["0", "1"]  # neither of two equal ones beats the other
    assert names() == []


def test_costs_are_on_a_log_axis_and_accuracy_goes_up():
    found = dots(drawn([Point(str(power), 50.0 + power, None, 10**power, None) for power in (3, 4, 5)]))
    lefts, heights = [x for x, _, _ in found], [y for _, y, _ in found]
    assert lefts[1] - lefts[0] == pytest.approx(lefts[2] - lefts[1], abs=0.2)
    assert lefts == sorted(lefts)
    assert heights == sorted(heights, reverse=True)


def test_ticks_of_costs_have_room_for_their_text():
    root = drawn([Point("a", 80.0, None, 16_000, None), Point("b", 85.0, None, 70_000, None)])
    ticks = [text for text in root.iter(f"{SVG}text") if text.text.endswith("kB")]
    found = [float(re.search(r"translate\((\S+)|x=", ET.tostring(text, encoding="unicode"))[1]) for text in ticks]
    assert len(found) >= 3
    assert all(after - before > 20 for before, after in pairwise(found))


def test_perfect_accuracy_has_a_tick_of_its_own():
    root = drawn([Point("a", 100.0, None, 1, None), Point("b", 98.0, None, 2, None)])
    tick = next(text for text in root.iter(f"{SVG}text") if text.text == "100")
    assert height(tick) == pytest.approx(dots(root)[0][1], abs=5)
    assert not {"99", "98.5", "99.5"} & set(texts(root))


def test_untrusted_names_and_titles_are_escaped():
    name = '<script>a</script> & $x$ \x1b[31m"'
    text = pareto_svg([Point(name[:25], 50.0, None, 1000, 1.0)], title=name)
    assert "<script" not in text
    assert "\x1b" not in text
    root = ET.fromstring(text)
    assert root.find(f"{SVG}title").text == name.replace("\x1b", "?")
    assert texts(root).count(name[:25].replace("\x1b", "?")) == 2


@pytest.mark.parametrize(
    "points",
    [
        USUAL,
        [Point(f"equal {number}", 50.0, around(50.0), 1000, 2.0) for number in range(12)],
        [
            Point(f"{number} network of a row " * 3, 70 + number / 50, around(70), 10**6 + 9000 * number, 1)
            for number in range(20)
        ],
    ],
    ids=["usual", "all equal", "crowd of long names"],
)
def test_names_do_not_overlap(points):
    root = drawn(points)
    firsts = {point.name[:6] for point in points}
    names = [text for text in root.iter(f"{SVG}text") if text.text[:6] in firsts]
    assert len(names) == 2 * len(points)
    for panel in (names[: len(points)], names[len(points) :]):
        heights = sorted(map(height, panel))
        assert all(after - before > 15 for before, after in pairwise(heights))
        assert heights[0] > 0
        assert heights[-1] < float(root.get("viewBox").split()[3])


@pytest.mark.parametrize(
    "points",
    [
        [],
        [Point("one", 100.0, None, 1, 0.0001)],
        [Point("one", 0.0, around(0.0), 10**12, None)],
        [Point("with", 50.0, around(50.0), 1000, 1.0), Point("without", 60.0, None, 2000, None)],
        [Point("near", 50.0, None, 1000, 1.0), Point("far", 50.0, None, 10**11, 1e7)],
    ],
)
def test_few_equal_and_unmeasured_points_are_drawn(points):
    root = drawn(points)
    measured = [point for point in points if point.latency_ms is not None]
    assert len(dots(root)) == len(points) + len(measured)
    assert texts(root).count("not measured") == (not points) + (not measured)
    assert "nan" not in ET.tostring(root, encoding="unicode")


@pytest.mark.parametrize("largest", [1.05, 1.5, 4.9, 6, 30, 1000, 10**7])
def test_axes_have_a_few_distinct_ticks(largest):
    root = drawn([Point("a", 80.0, around(80.0), 1000, 1.0), Point("b", 80.0 + largest % 15, None, 1000, largest)])
    ticks = [text for text in texts(root) if text.endswith(" ms")]
    assert 2 <= len(set(ticks)) == len(ticks) <= 10


def test_file_is_self_contained_themed_and_deterministic():
    text = pareto_svg(USUAL, title="A run")
    assert "prefers-color-scheme: dark" in text
    assert "viewBox" in text
    assert "<script" not in text
    assert "url(" not in text
    assert set(re.findall(r"https?://[^\"]*", text)) == {"http://www.w3.org/2000/svg"}
    assert pareto_svg(USUAL, title="A run") == text


def test_panels_for_the_page_have_titles():
    panels = pareto_panels(USUAL, title="A run")
    assert [re.search("<title>(.*?)</title>", panel)[1] for panel in panels] == [
        "A run: accuracy, % by ONNX file size",
        "A run: accuracy, % by latency",
    ]
