"""Text of the data stays text in report.md and in the model card, whatever it holds."""

from __future__ import annotations

import pytest
from jinja2 import DictLoader
from markdown_it import MarkdownIt

from lbr_ds.system.markdown import escape, template_environment

TEXTS = [
    "<script>alert(1)</script>",
    "![x](https://evil/p.png)",
    "[x](javascript:alert(1))",
    "a | b |",
    "`code`",
    "``",
    "# heading",
    "---",
    "===",
    "- item",
    "+ item",
    "1. one",
    "2) two",
    "> quote",
    "*a* **b** _c_ __d__",
    "snake_case_name",
    "~~gone~~",
    "$x^2$",
    "a\\|b \\",
    "&lt; &amp; &copy;",
    "line\n---\nline",
    "<https://evil>",
    "<!-- x -->",
    "[^1]",
    "* item",
    "\\<b>",
    "a*b*c",
    "|---|",
]


@pytest.mark.parametrize("text", TEXTS)
def test_a_reader_sees_the_text_and_nothing_else(text: str) -> None:
    """By CommonMark with GitHub's tables: one paragraph, or one cell, of that text alone."""
    parser = MarkdownIt("commonmark").enable(["table", "strikethrough"])
    wanted = " ".join(text.split())
    paragraph = parser.parse(escape(text))
    assert [token.type for token in paragraph] == ["paragraph_open", "inline", "paragraph_close"]
    assert {child.type for child in paragraph[1].children or []} <= {"text", "text_special"}
    assert "".join(child.content for child in paragraph[1].children or []) == wanted
    table = parser.parse(f"| a |\n|---|\n| {escape(text)} |")
    cells = [token for token in table if token.type == "inline"]
    assert [cell.content for cell in cells[:1]] == ["a"]
    assert len(cells) == 2
    assert "".join(child.content for child in cells[1].children or []) == wanted


def test_templates_escape_by_themselves() -> None:
    templates = template_environment(
        DictLoader({"x": '{{ a }} {{ a | code }}\n{{ a | fenced("yaml") }}'})
    )
    made = templates.get_template("x").render(a="```<b>|")
    assert made == "\\`\\`\\`&lt;b&gt;\\| ```` ```<b>\\| ````\n````yaml\n```<b>|\n````"
    assert templates.get_template("x").render(a="5").startswith("5 `5`")
