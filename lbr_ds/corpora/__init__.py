"""Raw corpora -> cleaned, united and divided records, proved free of leaks, and written as shards.

    from lbr_ds.corpora.prepare import prepare
    curation = prepare(config.data, config.seed)

A format is a function of (file, its part of the recipe) that yields rows; a new one is one
function and one line in FORMATS. What becomes of a row is the recipe's to say (`shapes.py`). No
torch import.
"""

from __future__ import annotations

from lbr_ds.corpora.formats.beir import read_beir
from lbr_ds.corpora.formats.columnar import read_arrow, read_hub, read_parquet
from lbr_ds.corpora.formats.delimited import read_csv, read_tsv
from lbr_ds.corpora.formats.icd10cm import read_icd10cm
from lbr_ds.corpora.formats.jsonl import read_jsonl
from lbr_ds.corpora.formats.obo import read_obo
from lbr_ds.corpora.formats.python_functions import read_functions
from lbr_ds.corpora.formats.rows import Format
from lbr_ds.corpora.formats.text import read_text

FORMATS: dict[str, Format] = {
    "jsonl": read_jsonl,
    "csv": read_csv,
    "tsv": read_tsv,
    "parquet": read_parquet,
    "arrow": read_arrow,
    "text": read_text,
    "beir": read_beir,
    "python": read_functions,
    "obo": read_obo,
    "icd10cm": read_icd10cm,
    "hub": read_hub,
}
