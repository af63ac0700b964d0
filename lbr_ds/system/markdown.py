"""Write foreign text into Markdown (report.md, the model card) so that it stays plain text.

`template_environment` makes templates in which every value is escaped unless a filter says
otherwise, as autoescape does for HTML.
"""

from __future__ import annotations

import re
from typing import Any

from jinja2 import BaseLoader, Environment
from markupsafe import Markup

_INLINE = re.compile(r"[\\`*\[\]|~$]|(?<![^\W_])_|_(?![^\W_])")
_HTML = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}
# What makes a line a list item, a heading or a rule if it is at the start.
_BLOCK = re.compile(r"(?:[-+]|#{1,6})(?:\s|$)|-{3,}|={3,}")
_NUMBERED = re.compile(r"^(\d{1,9})(?=[.)](?:\s|$))")


def escape(text: str) -> str:
    """Return a text as one line of Markdown that shows it literally.

    It cannot produce HTML, links, images, emphasis, code, tables, mathematics, headings, lists or
    front matter.
    """
    line = re.sub(r"[&<>]", lambda found: _HTML[found[0]], " ".join(text.split()))
    line = _INLINE.sub(lambda found: f"\\{found[0]}", line)
    return f"\\{line}" if _BLOCK.match(line) else _NUMBERED.sub(r"\1\\", line)


def code_span(text: object) -> Markup:
    """Return a text as a code span, whatever backticks it contains."""
    line = " ".join(str(text).split()).replace("|", "\\|")
    ticks = "`" * (1 + _longest(line))
    room = " " if line.startswith("`") or line.endswith("`") else ""
    return Markup(f"{ticks}{room}{line}{room}{ticks}")


def code_block(text: str, language: str = "") -> Markup:
    """Return lines as a code block, whatever backticks they contain."""
    ticks = "`" * max(3, 1 + _longest(text))
    return Markup(f"{ticks}{language}\n{text.rstrip()}\n{ticks}")


def _longest(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)


def template_environment(loader: BaseLoader, **options: Any) -> Environment:
    """Return a jinja2 environment for Markdown.

    Values are escaped, except the results of the filters `code` and `fenced`.
    """
    made = Environment(loader=loader, finalize=_escaped, trim_blocks=True, **options)
    made.filters |= {"code": code_span, "fenced": code_block}
    return made


def _escaped(value: Any) -> Any:
    return escape(value) if isinstance(value, str) and not isinstance(value, Markup) else value
