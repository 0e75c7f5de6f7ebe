"""The Pareto picture is one well-formed SVG file that shows every network and who is on the front, and stands alone."""

import re
import xml.etree.ElementTree as ET

import pytest

from pipeline.report.pareto import Box, Dot, Point, draw_pareto, front, pareto_svg

SVG = "{http://www.w3.org/2000/svg}"

USUAL = (
    Point("teacher", 97.2, None, 2_000_000, 9.0),
    Point("student alone", 91.0, 0.6, 400_000, 1.5),
    Point("student distilled", 93.5, 0.4, 400_000, 1.5),
    Point("pruned", 92.0, 0.5, 150_000, 0.8),
    Point("int8", 93.4, 0.3, 110_000, 0.5),
    Point("pruned int8", 91.5, 0.3, 45_000, 0.25),
)


def drawn(points, title="A run"):
    return ET.fromstring(pareto_svg(points, title=title))


def circles(root):
    """The names of the dots in drawing order, with the class of each."""
    return [(one.find(f"{SVG}title").text, one.get("class")) for one in root.iter(f"{SVG}circle")]


def labels(root):
    """The boxes in which the networks' names stand, from their middles and a font of the usual width."""
    boxes = []
    for text in root.iter(f"{SVG}text"):
        if text.get("class") == "name":
            x, y, half = float(text.get("x")), float(text.get("y")), 0.5 * 15 * len(text.text) / 2
            boxes.append(Box(x - half, y - 12, x + half, y + 3))
    return boxes


def test_every_network_is_in_both_panels_and_those_on_the_front_are_filled():
    root = drawn(USUAL)
    on_front = {"teacher", "student distilled", "int8", "pruned int8"}
    expected = [(point.name, "on" if point.name in on_front else "off") for point in USUAL]
    assert circles(root) == expected * 2
    texts = [text.text for text in root.iter(f"{SVG}text")]
    assert all(texts.count(point.name) == 2 for point in USUAL)


def test_the_front_leaves_out_what_another_network_beats():
    def names(*pairs):
        dots = [Dot(Point(str(number), accuracy, None, 1, None), cost) for number, (cost, accuracy) in enumerate(pairs)]
        return [dot.point.name for dot in front(dots)]

    assert names((3, 90), (1, 70), (2, 80)) == ["1", "2", "0"]
    assert names((3, 90), (1, 90)) == ["1"]  # as accurate for less
    assert names((1, 70), (1, 90)) == ["1"]  # more accurate for the same
    assert names((1, 70), (1, 70), (2, 60)) == ["0", "1"]  # neither of two equal ones beats the other
    assert names() == []


def test_higher_accuracy_is_higher_and_larger_cost_further_right_in_decades():
    points = [Point(str(power), 50.0 + power, None, 10**power, None) for power in (3, 4, 5)]
    dots = list(drawn(points).iter(f"{SVG}circle"))
    lefts, heights = ([float(dot.get(key)) for dot in dots] for key in ("cx", "cy"))
    assert lefts[1] - lefts[0] == pytest.approx(lefts[2] - lefts[1], abs=0.2)
    assert lefts == sorted(lefts) and heights == sorted(heights, reverse=True)


def test_names_and_titles_of_strangers_are_escaped():
    name = '<script>alert("1")</script> & \x1b[31mred'
    text = pareto_svg([Point(name, 50.0, None, 1000, 1.0)], title=name)
    assert "<script" not in text and "\x1b" not in text
    root = ET.fromstring(text)
    assert circles(root)[0][0] == name.replace("\x1b", "?")
    assert root.find(f"{SVG}title").text == name.replace("\x1b", "?")


@pytest.mark.parametrize(
    "points",
    [
        USUAL,
        [Point(f"equal {number}", 50.0, 1.0, 1000, 2.0) for number in range(12)],
        [
            Point(f"network {number} of a row " * 3, 70 + number / 50, 0.1, 10**6 + 9000 * number, 1)
            for number in range(20)
        ],
    ],
    ids=["usual", "all equal", "crowd of long names"],
)
def test_no_label_lies_on_another(points):
    root = drawn(points)
    width, height = map(float, root.get("viewBox").split()[2:])
    boxes = labels(root)
    assert len(boxes) == 2 * len(points)
    for number, box in enumerate(boxes):
        assert box.left > 0 and box.right < width and box.top > 0 and box.bottom < height
        assert not any(box.overlaps(other) for other in boxes[:number])


@pytest.mark.parametrize(
    "points",
    [
        [],
        [Point("one", 100.0, None, 1, 0.0001)],
        [Point("one", 0.0, 0.0, 10**12, None)],
        [Point("with", 50.0, 2.0, 1000, 1.0), Point("without", 60.0, None, 2000, None)],
        [Point("near", 50.0, None, 1000, 1.0), Point("far", 50.0, None, 10**11, 1e7)],
    ],
)
def test_few_equal_and_unmeasured_points_are_drawn_too(points):
    root = drawn(points)
    measured = [point for point in points if point.latency_ms is not None]
    assert len(circles(root)) == len(points) + len(measured)
    unmeasured = [text for text in root.iter(f"{SVG}text") if text.text == "not measured"]
    assert len(unmeasured) == (not points) + (not measured)
    assert "nan" not in ET.tostring(root, encoding="unicode")


@pytest.mark.parametrize("most", [1.05, 1.5, 4.9, 6, 30, 1000, 10**7])
def test_there_are_a_few_ticks_whatever_the_range(most):
    root = drawn([Point("a", 80.0, 0.1, 1000, 1.0), Point("b", 80.0 + most % 15, None, 1000, most)])
    ticks = [text.text for text in root.iter(f"{SVG}text") if text.get("class") == "tick"]
    assert 3 <= sum(text.endswith(" ms") for text in ticks) <= 10
    numbers = [text for text in ticks if re.fullmatch(r"[\d.]+", text)]
    assert len(set(numbers)) * 2 == len(numbers) >= 6  # the same in both panels, none twice


def test_bars_reach_one_deviation_up_and_down():
    root = drawn(USUAL)
    bars = [path.get("d") for path in root.iter(f"{SVG}path") if path.get("class") == "bar"]
    ends = [tuple(map(float, re.match(r"M[\d.]+ ([\d.]+)V([\d.]+)", bar).groups())) for bar in bars]
    measured = [(number, point) for number, point in enumerate(USUAL) if point.accuracy_std is not None]
    heights = [float(dot.get("cy")) for dot in root.iter(f"{SVG}circle")]
    assert len(ends) == 2 * len(measured)
    per_percent = (heights[1] - heights[0]) / (USUAL[0].accuracy_percent - USUAL[1].accuracy_percent)
    for (low, high), (number, point) in zip(ends, measured, strict=False):
        assert low - heights[number] == pytest.approx(point.accuracy_std * per_percent, abs=0.2)
        assert heights[number] - high == pytest.approx(point.accuracy_std * per_percent, abs=0.2)


def test_what_a_logarithm_does_not_take_is_refused():
    for size, latency in ((0, 1.0), (1000, 0.0), (1000, float("nan"))):
        with pytest.raises(ValueError, match="cannot be drawn"):
            Point("one", 50.0, None, size, latency)


def test_the_file_stands_alone_suits_dark_pages_and_has_the_same_bytes_each_time(tmp_path):
    path = tmp_path / "pareto.svg"
    draw_pareto(USUAL, path, title="A run")
    text = path.read_text()
    assert "prefers-color-scheme: dark" in text and "viewBox" in text
    assert "<script" not in text and "url(" not in text
    assert set(re.findall(r"https?://[^\"]*", text)) == {"http://www.w3.org/2000/svg"}
    draw_pareto(USUAL, path, title="A run")
    assert path.read_text() == text
