"""Tables on terminals of any width: numbers stay whole, and nothing is lost."""

import io
import re

import pytest
from rich.console import Console

from kdpipe.pipeline.terminal.tables import Table, print_short_table, print_table

ROWS = [
    ["teacher", "99.25", "1,234,567", "1615.2 KiB", "0.017 (0.027)", "-", "9: 92.89 ± 0.61"],
    ["pruned + INT8, hard labels", "97.47 ± 0.18", "2,884", "9.9 KiB", "0.331 (11.126)", "1/12.3", "[red]a: 5.00"],
]
HEADERS = ["network", "test accuracy %", "parameters", "ONNX file", "batch of 64", "size / teacher's", "worst class %"]


def printed(table, width):
    file = io.StringIO()
    print_table(Console(file=file, width=width, markup=False, highlight=False), table)
    return file.getvalue()


@pytest.mark.parametrize("width", [200, 100, 80, 60, 45])
def test_no_number_is_wrapped(width):
    text = printed(Table("Results", HEADERS, ROWS), width)
    assert max(map(len, text.splitlines())) <= width
    for row in ROWS:
        assert all(cell in text for cell in row[1:])
    assert text.count("teacher") >= 1 + (width <= 80)  # the names are repeated beside the columns that follow


def test_long_names_are_folded():
    path = "runs/" + "a" * 150 + ".onnx"
    text = printed(Table("", ["file", "bytes", "batch 1, ms"], [[path, "123,456", "0.123 / 0.456"]]), 80)
    assert path in "".join(re.sub(r"123,456|0.123 / 0.456", "", text).split())
    assert len(text.splitlines()) < 12


def test_a_table_of_names_alone():
    assert "only" in printed(Table("", ["network"], [["only"]]), 80)


def test_short_tables_leave_out_what_does_not_fit():
    file = io.StringIO()
    out = Console(file=file, width=80, markup=False, highlight=False)
    print_short_table(
        out, Table("Results", [*HEADERS[:2], "nothing", *HEADERS[2:]], [[*r[:2], "-", *r[2:]] for r in ROWS]), "all"
    )
    *lines, last = file.getvalue().splitlines()
    assert sum("teacher " in line for line in lines) == 1  # one table
    assert max(map(len, lines)) <= 80 and "97.47 ± 0.18" in "".join(lines)
    assert last == "more: batch of 64, size / teacher's, worst class %: all"
