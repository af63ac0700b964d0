"""The section `mining`: how hard negatives are found for the records of the split `cl`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from lbr_ds.config.section import MAX_COUNT, NameOrPath, Section

_TOGETHER, _FEW = 8192, 256  # queries
_PARTS = 16  # of a search
_HELD = 1 << 20  # passages in all rankings of a search
_Rank = Annotated[int, Field(ge=1, le=MAX_COUNT)]


class MiningConfig(Section):
    """How `lbr-ds mine` finds hard negatives. The rules are described in `mining/rules.py`."""

    methods: tuple[Literal["bm25", "dense"], ...] = Field(
        default=("bm25",),
        min_length=1,
        description="How candidates are retrieved: by words (bm25), by the vectors of "
        "mining.model (dense), or both.",
    )
    model: NameOrPath = Field(
        default="",
        description="For dense: a run, checkpoint or export of lbr-ds, or any model that "
        "sentence-transformers loads.",
    )
    trust_remote_code: bool = Field(
        default=False,
        description="Let the repositories of model, guide and teachers run their own code.",
    )
    guide: NameOrPath = Field(
        default="",
        description="A second model, named like mining.model. It drops candidates that it scores "
        "at or above the positive. Empty: none.",
    )
    passages: tuple[Literal["cl", "gl"], ...] = Field(
        default=("cl",), min_length=1, description="Splits whose passages are candidates."
    )
    ranks: tuple[_Rank, _Rank] = Field(
        default=(1, 100),
        description="First and last rank of a candidate. [10, 100] skips the nearest, which are "
        "the most likely to be unlabelled answers.",
    )
    keep: int = Field(
        default=4,
        ge=1,
        le=10_000,
        json_schema_extra={"unit": "negatives per record"},
        description="Most negatives that are added to a record.",
    )
    pick: Literal["top", "random"] = Field(
        default="top",
        description="Among the candidates within mining.ranks: take the nearest, or draw by seed.",
    )
    max_ratio: float | None = Field(
        default=0.95,
        gt=0,
        le=100,
        description="Drop candidates that score above this share of the positive's score. "
        "null: no such limit.",
    )
    margin: float | None = Field(
        default=None,
        ge=0,
        le=1e6,
        description="Drop candidates that score less than this below the positive. "
        "null: no such limit.",
    )

    score_with: NameOrPath = Field(
        default="",
        description="A teacher that scores the positives and negatives of every record, for "
        "stage2.distillation: a cross-encoder of sentence-transformers, or an embedder, named like "
        "mining.model. Empty: the records keep the scores they came with.",
    )
    teacher_vectors: NameOrPath = Field(
        default="",
        description="An embedder, named like mining.model, whose vectors of the texts of cl are "
        "written beside the shards, for stage2.distillation.loss batch_kl and batch_cosine. "
        "Empty: none.",
    )

    @property
    def has_teacher(self) -> bool:
        """Whether a teacher has anything to say."""
        return bool(self.score_with or self.teacher_vectors)

    @model_validator(mode="after")
    def _complete(self) -> MiningConfig:
        if "dense" in self.methods and not self.model:
            raise ValueError("methods has dense and model is empty; name a model, or leave it out")
        if self.ranks[0] > self.ranks[1]:
            raise ValueError(f"ranks={list(self.ranks)}; give [first, last]")
        return self


def searched_together(queries: int, count: int) -> int:
    """Return how many of `queries` are searched at once for rankings of `count` passages each.

    The vectors of all passages are read once for so many queries. Ranks share a search by such
    parts, so there are at least 16 of them unless they are small.
    """
    part = max(_FEW, -(-queries // _PARTS))
    return max(1, min(_TOGETHER, _HELD // count, part))
