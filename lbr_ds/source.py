"""The recipe's words for one raw corpus: where it lies, its layout, what its columns mean."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from lbr_ds.address import Masked


class Part(BaseModel):
    """A part of the recipe: frozen, unknown keys refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)


class ColumnsConfig(Part):
    """Which column of a row is which part of a record; what is left out has the part's own name.

    A column's name, `outer.inner` for a nested one, or a template: "{name}. {definition}".
    """

    id: str = ""
    group: str = ""
    instruction: str = ""
    query: str = ""
    positives: str | list[str] = ""  # a list: several columns
    negatives: str | list[str] = ""
    options: str | list[str] = ""  # choices: one column (a list or a mapping), or one for each
    answer: str = ""
    title: str = ""
    body: str = ""
    text: str = ""


class SourceConfig(Part):
    """One raw corpus. Read by `corpora/`."""

    # File or folder, wheel:NAME==VERSION/FILE#sha256=..., https://..., python:stdlib or
    # python:PACKAGE (an installed one), hf:NAME[@REVISION] (a Hugging Face data set, streamed).
    path: Masked
    format: str = ""  # a name in corpora.FORMATS; empty: told by the file's suffix
    shape: Literal["", "records", "pairs", "choices", "titled", "passages"] = ""  # see shapes.py
    columns: ColumnsConfig = ColumnsConfig()
    answer_as: Literal["letter", "from_0", "from_1", "text"] = "letter"  # how choices tell it
    where: dict[str, str] = Field(default_factory=dict)  # column: pattern that its text must match
    header: list[str] = Field(default_factory=list)  # csv without one; a last "*rest" takes a tail
    subset: str = ""  # of a Hugging Face data set
    split: str = ""  # of a Hugging Face data set (train), or of BEIR's qrels (all)
    name: str = ""  # written into each record as `source` where it has none
    license: str = ""  # stated in curation.json
    origin: str = ""  # whom to cite; stated in curation.json
    keep_lines: bool | None = None  # line ends and indentation; left out: for code only
    max_shared_letters: int | None = Field(default=None, ge=1)  # run common to query and answer
    max_records: int | None = Field(default=None, ge=1)

    @field_validator("where")
    @classmethod
    def _patterns(cls, value: dict[str, str]) -> dict[str, str]:
        for column, pattern in value.items():
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"the pattern for {column} is none: {error}") from None
        return value
