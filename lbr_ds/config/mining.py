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
        description="Let the repositories of the model, the guide and the teachers run their own "
        "code.",
    )
    guide: NameOrPath = Field(
        default="",
        description="A second model, given in the same way as mining.model. Candidates that it "
        "scores at or above the positive are dropped. Empty: none.",
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
        description="Maximum number of negatives that are added to a record.",
    )
    pick: Literal["top", "random"] = Field(
        default="top",
        description="Which candidates within mining.ranks are taken. top: the nearest. random: a "
        "random sample, drawn by seed.",
    )
    max_ratio: float | None = Field(
        default=0.95,
        gt=0,
        le=100,
        description="Drop candidates whose score is above this share of the positive's score. "
        "null: no such limit.",
    )
    margin: float | None = Field(
        default=None,
        ge=0,
        le=1e6,
        description="Drop candidates whose score is not at least this much below the positive's. "
        "null: no such limit.",
    )

    score_with: NameOrPath = Field(
        default="",
        description="A teacher that scores the positives and negatives of every record, for "
        "stage2.distillation: a cross-encoder of sentence-transformers, or an embedder, given in "
        "the same way as mining.model. Empty: the records keep the scores that they came with.",
    )
    teacher_vectors: NameOrPath = Field(
        default="",
        description="An embedder, given in the same way as mining.model. Its vectors of the texts "
        "of cl are written beside the shards, for stage2.distillation.loss batch_kl and "
        "batch_cosine. Empty: none.",
    )

    @property
    def has_teacher(self) -> bool:
        """Whether a teacher is named, for scores or for vectors."""
        return bool(self.score_with or self.teacher_vectors)

    @model_validator(mode="after")
    def _complete(self) -> MiningConfig:
        if "dense" in self.methods and not self.model:
            raise ValueError("methods has dense and model is empty; name a model, or remove dense")
        if self.ranks[0] > self.ranks[1]:
            raise ValueError(f"ranks={list(self.ranks)}; give [first, last]")
        return self


def searched_together(queries: int, count: int) -> int:
    """Return how many of `queries` are searched at once for rankings of `count` passages each.

    The vectors of all passages are read once for each such part of the queries. Ranks share a
    search part by part, so there are at least 16 parts unless they would be small.
    """
    part = max(_FEW, -(-queries // _PARTS))
    return max(1, min(_TOGETHER, _HELD // count, part))
