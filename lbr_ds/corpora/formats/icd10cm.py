"""Read the ICD-10-CM tabular list (XML): inclusion term -> title of its code and its parents.

"Ragpicker's disease" -> "Pulmonary anthrax. In: Anthrax". Parents are codes, nearest first;
chapters and sections are left out. Codes without inclusion terms give no row.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

from lbr_ds.config import SourceConfig
from lbr_ds.corpora.formats.interface import Format, Row
from lbr_ds.errors import DataError


def read_icd10cm(path: Path, source: SourceConfig) -> Iterator[Row]:
    """Yield a row per inclusion term, in the form of a record: id CODE-N, group CODE.

    Raises:
        DataError: The file is not well-formed XML.
    """
    outer: list[ElementTree.Element] = []  # the enclosing codes
    try:
        for event, element in ElementTree.iterparse(path, ("start", "end")):
            if element.tag != "diag":
                continue
            if event == "start":
                outer.append(element)
                continue
            outer.pop()
            yield from _terms(path, element, outer)
            element.clear()  # frees what a code holds; the codes inside it have read its title
    except (ElementTree.ParseError, OSError) as error:
        raise DataError(f"{path}: not the ICD-10-CM tabular XML ({error})") from None


def _terms(
    path: Path, code: ElementTree.Element, outer: list[ElementTree.Element]
) -> Iterator[Row]:
    label = (code.findtext("name") or "").strip()
    parents = "; ".join(_title(parent) for parent in reversed(outer))
    passage = f"{_title(code)}. In: {parents}" if parents else _title(code)
    for number, note in enumerate(code.findall("inclusionTerm/note"), 1):
        where = f"{path}: code {label}, inclusion term {number}"
        name = f"{label}-{number}"
        raw = {
            "id": name,
            "query": "".join(note.itertext()),
            "positives": [passage],
            "group": label,
        }
        yield Row(where, name, raw)


def _title(code: ElementTree.Element) -> str:
    return (code.findtext("desc") or "").strip()


ICD10CM = Format(read_icd10cm, shape="records", is_text=False, only_files=True)
