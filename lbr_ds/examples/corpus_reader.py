"""Write a reader for a new corpus format, and prepare training data with it.

    python corpus_reader.py glossary.txt data/glossary

A format is a function of (file, its source in the recipe) that yields rows. The recipe says what a
row's columns mean (`shape`, `columns`, `where`), as for every other format. To make the format part
of the package, put it into a file of `lbr_ds/corpora/formats/` and its name into FORMATS.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import lbr_ds
from lbr_ds.config import SourceConfig
from lbr_ds.corpora.formats import FORMATS
from lbr_ds.corpora.formats.interface import Format, Row
from lbr_ds.errors import DataError


def read_glossary(path: Path, source: SourceConfig) -> Iterator[Row]:
    """Yield one row for each line of the form `TERM: DEFINITION`.

    Args:
        path: The file.
        source: The source as the recipe describes it, with its encoding.

    Yields:
        Where the row is (for messages), a key that its record's id is made of, and its columns; or
        a DataError in their place, which `data.on_error` turns into an error or a count.
    """
    with path.open(encoding=source.encoding) as lines:
        for number, line in enumerate(lines, 1):
            where = f"{path}:{number}"
            term, colon, definition = line.strip().partition(": ")
            if colon:
                yield Row(where, str(number), {"term": term, "definition": definition})
            else:
                yield Row(where, str(number), DataError(f"{where}: expected TERM: DEFINITION"))


def main(file: str, folder: str) -> None:
    """Prepare FILE into FOLDER and print what became of it."""
    FORMATS["glossary"] = Format(read_glossary)
    source = f"{{path: {file}, format: glossary, columns: {{query: term, positives: definition}}}}"
    recipe = lbr_ds.load_recipe("demo", [f"data.folder={folder}", f"data.sources=[{source}]"])
    curation = lbr_ds.prepare(recipe)
    for name, split in curation["splits"].items():
        print(f"{name}: {split['records']} records, such as {split['samples'][:1]}")


if __name__ == "__main__":
    main(*sys.argv[1:])
