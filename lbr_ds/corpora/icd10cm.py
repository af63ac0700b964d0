"""The ICD-10-CM tabular list (XML): inclusion term -> title of its code, within its parents.

"Ragpicker's disease" -> "Pulmonary anthrax. In: Anthrax". Parents are codes, nearest first;
chapters and sections are left out. Codes without inclusion terms give no record.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

from lbr_ds.config import SourceConfig
from lbr_ds.corpora.reading import Found, source_name
from lbr_ds.errors import DataError
from lbr_ds.records import Record


def read_icd10cm(path: Path, source: SourceConfig) -> Iterator[Found]:
    """Yield one record an inclusion term: id CODE-N, group CODE.

    Raises DataError when the file is not well-formed XML.
    """
    name = source_name(source, path)
    outer: list[ElementTree.Element] = []  # the codes that we are inside of
    try:
        for event, element in ElementTree.iterparse(path, ("start", "end")):
            if element.tag != "diag":
                continue
            if event == "start":
                outer.append(element)
                continue
            outer.pop()
            yield from _terms(path, name, element, outer)
            element.clear()  # keeps memory at one chapter; a code's titles are read before this
    except (ElementTree.ParseError, OSError) as error:
        raise DataError(f"{path}: not the ICD-10-CM tabular XML ({error})") from None


def _terms(
    path: Path, name: str, code: ElementTree.Element, outer: list[ElementTree.Element]
) -> Iterator[Found]:
    label = (code.findtext("name") or "").strip()
    parents = "; ".join(_title(parent) for parent in reversed(outer))
    passage = f"{_title(code)}. In: {parents}" if parents else _title(code)
    for number, note in enumerate(code.findall("inclusionTerm/note"), 1):
        where = f"{path}: code {label}, inclusion term {number}"
        raw = {"id": f"{label}-{number}", "source": name, "query": "".join(note.itertext()),
               "positives": [passage], "group": label}  # fmt: skip
        try:
            yield where, Record.from_dict(raw, where)
        except DataError as error:
            yield where, error


def _title(code: ElementTree.Element) -> str:
    return (code.findtext("desc") or "").strip()
