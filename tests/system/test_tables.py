"""A table reads back from Markdown as it was, and a terminal shows every cell."""

from __future__ import annotations

import pytest

from lbr_ds.system.tables import markdown_table, print_table

COLUMNS = ["model", "data", "R@10", "N@10"]
ROWS = [["base", "icd", "0.01", "0.00"], ["stage 2", "icd", "0.61", "0.48"]]


def test_markdown() -> None:
    head, rule, *rows = markdown_table(COLUMNS, ROWS, text_columns=2).splitlines()
    assert rule == "| --- | --- | --: | --: |"
    assert [[c.strip() for c in row.strip("|").split("|")] for row in (head, *rows)] == [
        COLUMNS,
        *ROWS,
    ]


@pytest.mark.parametrize("frame", [True, False])
def test_terminal(frame: bool, capsys: pytest.CaptureFixture[str]) -> None:
    print_table(COLUMNS, ROWS, text_columns=2, title="scores", frame=frame)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].strip() == "scores"
    for row in ROWS:
        assert any(all(cell in line for cell in row) for line in lines)
