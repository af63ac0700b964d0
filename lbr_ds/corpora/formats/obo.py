"""Read OBO ontologies (HPO, GO): a row per name or synonym of a term that is not obsolete.

A row has `id`, `name`, `definition`, `namespace`, `synonym`, `scope` (EXACT, RELATED, ...), `type`
(layperson, abbreviation, ...; often empty) and `number`. The row of the term's own name, number 0,
has it as `synonym` too, with the scope NAME. The recipe selects by `where` and `columns`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from lbr_ds.config import ColumnsConfig, SourceConfig
from lbr_ds.corpora.formats.interface import Format, Row
from lbr_ds.corpora.formats.lines import numbered_lines
from lbr_ds.errors import DataError

_QUOTED = re.compile(r'"(?P<text>(?:[^"\\]|\\.)*)"\s*(?P<rest>[^\[]*)')
_ESCAPED = re.compile(r"\\(.)")


def read_obo(path: Path, source: SourceConfig) -> Iterator[Row]:
    """Yield a row per name, with key TERM-0, and per synonym, with key TERM-N.

    Raises:
        DataError: The file contains no term.
    """
    terms = 0
    for number, tags in _terms(path, source.encoding):
        terms += 1
        if isinstance(tags, DataError):
            yield Row(f"{path}:{number}", str(number), tags)
        elif "true" not in tags.get("is_obsolete", []):
            yield from _names(path, number, tags)
    if not terms:
        raise DataError(f"{path}: contains no [Term]; not an OBO file")


def _terms(path: Path, encoding: str) -> Iterator[tuple[int, dict[str, list[str]] | DataError]]:
    """Yield the tags of each [Term] with the number of its first line."""
    first, tags = 0, dict[str, list[str]]()
    fault: DataError | None = None
    for number, line in numbered_lines(path, encoding):
        if isinstance(line, DataError):
            text, fault = "", line
        else:
            text = line.strip()
        if text.startswith("[") and text.endswith("]"):
            if first:
                yield first, fault or tags
            first, tags, fault = (number if text == "[Term]" else 0), {}, None
        elif first and ": " in text:
            tag, value = text.split(": ", 1)
            tags.setdefault(tag, []).append(value)
    if first:
        yield first, fault or tags


def _names(path: Path, number: int, tags: dict[str, list[str]]) -> Iterator[Row]:
    where = f"{path}:{number}"
    term, name = (tags.get(tag, [""])[0] for tag in ("id", "name"))
    definition, _ = _quoted(tags.get("def", [""])[0])
    named = [(name, "NAME"), *map(_quoted, tags.get("synonym", []))]
    for count, (text, rest) in enumerate(named):
        scope, kind = (*rest.split(), "", "")[:2]
        yield Row(
            where,
            f"{term}-{count}",
            {
                "id": term,
                "name": name,
                "definition": definition,
                "namespace": tags.get("namespace", [""])[0],
                "synonym": text,
                "scope": scope,
                "type": kind,
                "number": str(count),
            },
        )


def _quoted(value: str) -> tuple[str, str]:
    """Return the text in quotes, and what is between it and the references in brackets."""
    match = _QUOTED.match(value)
    return (_ESCAPED.sub(r"\1", match["text"]), match["rest"]) if match else ("", "")


OBO = Format(
    read_obo,
    suffixes=(".obo",),
    columns=ColumnsConfig(query="synonym", positives="definition", group="id"),
    only_files=True,
)
