"""Raw corpora -> cleaned, united and divided records, proved free of leaks, and written as shards.

    from lbr_ds.corpora.prepare import prepare
    curation = prepare(config.data, config.seed)

A reader is a function of (file, its part of the recipe) that yields `(where, Record or DataError)`;
a new format is one function and one line in READERS. No torch import.
"""

from __future__ import annotations

from lbr_ds.corpora.icd10cm import read_icd10cm
from lbr_ds.corpora.jsonl import read_jsonl
from lbr_ds.corpora.reading import Reader

READERS: dict[str, Reader] = {"jsonl": read_jsonl, "icd10cm": read_icd10cm}
