"""Read the ICD-10-CM tabular list (XML): inclusion term -> title of its code and its parents.

"Ragpicker's disease" -> "Pulmonary anthrax. In: Anthrax". Parents are codes, nearest first;
chapters and sections are left out. Codes without inclusion terms give no row. The rationale has the
titles from the chapter to the code: "Certain infectious and parasitic diseases; Certain zoonotic
bacterial diseases; Anthrax".
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

from lbr_ds.config import SourceConfig
from lbr_ds.corpora.formats.interface import Format, Row
from lbr_ds.errors import DataError

_LEVELS = ("chapter", "section", "diag")
_RANGE = re.compile(r" \([A-Z0-9]+(-[A-Z0-9]+)?\)$")  # of codes, after the title of a chapter


def read_icd10cm(path: Path, source: SourceConfig) -> Iterator[Row]:
    """Yield a row per inclusion term, in the form of a record: id CODE-N, group CODE.

    Raises:
        DataError: The file is not well-formed XML.
    """
    outer: list[ElementTree.Element] = []  # the enclosing chapter, section and codes
    try:
        for event, element in ElementTree.iterparse(path, ("start", "end")):
            if element.tag not in _LEVELS:
                continue
            if event == "start":
                outer.append(element)
                continue
            outer.pop()
            if element.tag == "diag":
                yield from _terms(path, element, outer)
            element.clear()  # keeps memory at one code; its title is read before this
    except (ElementTree.ParseError, OSError) as error:
        raise DataError(f"{path}: not the ICD-10-CM tabular XML ({error})") from None


def _terms(
    path: Path, code: ElementTree.Element, outer: list[ElementTree.Element]
) -> Iterator[Row]:
    label = (code.findtext("name") or "").strip()
    parents = "; ".join(_title(parent) for parent in reversed(outer) if parent.tag == "diag")
    way = "; ".join(_RANGE.sub("", _title(parent)) for parent in outer)
    passage = f"{_title(code)}. In: {parents}" if parents else _title(code)
    for number, note in enumerate(code.findall("inclusionTerm/note"), 1):
        where = f"{path}: code {label}, inclusion term {number}"
        name = f"{label}-{number}"
        raw = {
            "id": name,
            "query": "".join(note.itertext()),
            "positives": [passage],
            "group": label,
            "rationale": way,
        }
        yield Row(where, name, raw)


def _title(code: ElementTree.Element) -> str:
    return (code.findtext("desc") or "").strip()


ICD10CM = Format(read_icd10cm, shape="records", is_text=False, only_files=True)
