"""The section `data`: raw corpora, cleaning, splits, and the folder of prepared data."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from lbr_ds.config.section import MAX_COUNT, Folder, Section
from lbr_ds.config.sources import SourceConfig
from lbr_ds.system.urls import CACHE_GIB, require_local

SPLITS = ("gl", "cl", "eval")
CONTROL = "control"  # a fourth split, under protocol knowledge
_KNOWLEDGE_SIZES = {"gl": 0, "cl": 0.6, "eval": 0.2, "control": 0.2}  # defaults of that protocol


class SplitConfig(Section):
    """How many records each split gets: shares (0.6) or counts (150000), the same kind for all."""

    gl: float = Field(
        default=0.6,
        ge=0,
        le=1e12,
        json_schema_extra={"unit": "share or records"},
        description="Records for stage 1 (generative learning). Leave it out under protocol "
        "knowledge, where this split gets all facts.",
    )
    cl: float = Field(
        default=0.25,
        gt=0,
        le=1e12,
        json_schema_extra={"unit": "share or records"},
        description="Records for stage 2 (contrastive learning).",
    )
    eval: float = Field(
        default=0.15,
        gt=0,
        le=1e12,
        json_schema_extra={"unit": "share or records"},
        description="Held-out records. Under protocol knowledge stage 1 trains on their facts.",
    )
    control: float = Field(
        default=0,
        ge=0,
        le=1e12,
        json_schema_extra={"unit": "share or records"},
        description="Under protocol knowledge: held-out records whose facts no stage trains on.",
    )

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
        """Whether the sizes are shares of the corpus (none above 1) and not counts."""
        return all(s <= 1 for s in (self.gl, self.cl, self.eval, self.control))


class DataConfig(Section):
    """Raw corpora and the folder of prepared shards."""

    folder: Folder = Field(
        description="The prepared data: a local folder that `lbr-ds prepare` writes, or a URL "
        "(https://, s3://, file:///) to read it from.",
    )
    cache_gib: float = Field(
        default=CACHE_GIB,
        gt=0,
        le=1e9,
        json_schema_extra={"unit": "GiB"},
        description="GiB of local disk for the shards of a folder that is a URL.",
    )
    sources: list[SourceConfig] = Field(default_factory=list, description="The raw corpora.")
    size_exponent: float = Field(
        default=1,
        ge=0,
        le=1,
        description="How much the size of a source counts when training draws from several "
        "sources: the share of a source is proportional to weight * records**size_exponent. 1: "
        "proportional to the size. 0: the size does not matter, so that weights are shares. The "
        "key is 1 / temperature of multilingual sampling.",
    )
    protocol: Literal["random", "knowledge"] = Field(
        default="random",
        description="random: the paper's split. knowledge: stage 1 trains on the facts of all "
        "entities except a control set, and the evaluation queries are about entities that stage 2 "
        "has not seen.",
    )
    splits: SplitConfig = Field(
        default=SplitConfig(),
        description="Sizes of the splits. The defaults under protocol knowledge are cl 0.6, eval "
        "0.2 and control 0.2 of the pairs.",
    )
    min_chars: int = Field(
        default=1,
        ge=1,
        le=MAX_COUNT,
        json_schema_extra={"unit": "characters"},
        description="Drop records that have a text with fewer characters.",
    )
    max_chars: int = Field(
        default=20_000,
        ge=1,
        le=MAX_COUNT,
        json_schema_extra={"unit": "characters"},
        description="Drop records that have a text with more characters.",
    )
    min_tokens: int | None = Field(
        default=None,
        ge=1,
        le=MAX_COUNT,
        json_schema_extra={"unit": "tokens"},
        description="Drop records that have a text with fewer tokens of the backbone's tokenizer "
        "(bottleneck tokens do not count). null: no limit.",
    )
    max_tokens: int | None = Field(
        default=None,
        ge=1,
        le=MAX_COUNT,
        json_schema_extra={"unit": "tokens"},
        description="Drop records that have a text with more tokens of the backbone's tokenizer "
        "(bottleneck tokens do not count). null: no limit.",
    )
    languages: tuple[str, ...] = Field(
        default=(),
        description="ISO 639-1 codes, for example [en]: drop texts that are almost certainly in "
        "another language (needs the extra `language`). Empty: keep all.",
    )
    near_duplicate: float = Field(
        default=0.7,
        ge=0.6,
        le=1,
        description="Two texts that share at least this part of their word pairs (Jaccard index) "
        "are near duplicates. They go into the same split, and `mine` takes no near duplicate of a "
        "positive as a negative. 1: only equal texts.",
    )
    records_per_shard: int = Field(
        default=4096,
        ge=1,
        le=MAX_COUNT,
        json_schema_extra={"unit": "records"},
        description="Records in one tar shard.",
    )
    on_error: Literal["strict", "skip"] = Field(
        default="strict",
        description="What happens at an unreadable record or shard. strict: stop with an error. "
        "skip: replace it, count it and report it.",
    )
    workers: int = Field(
        default=1,
        ge=0,
        le=1024,
        json_schema_extra={"unit": "processes per rank"},
        description="Loader processes per rank, which build batches ahead of training. 0: the "
        "training process builds them itself.",
    )

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_the_protocol(cls, raw: Any) -> Any:
        if isinstance(raw, dict) and raw.get("protocol") == "knowledge":
            sizes = raw.get("splits", {})
            if isinstance(sizes, dict) and not sizes.get("gl"):
                raw = {**raw, "splits": {**_KNOWLEDGE_SIZES, **sizes}}
        return raw

    @model_validator(mode="after")
    def _protocol_fits(self) -> DataConfig:
        if fault := _protocol_fault(self):
            raise ValueError(fault)
        return self

    @model_validator(mode="after")
    def _one_rule_per_name(self) -> DataConfig:
        rules = {source.name: (source.weight, source.temperature) for source in self.sources}
        for source in self.sources:
            if (source.weight, source.temperature) != rules[source.name]:
                raise ValueError(
                    f"sources: several are named {source.name!r} and differ in weight or "
                    "temperature; give them the same, or different names"
                )
        return self

    @property
    def weights(self) -> dict[str, float]:
        """The weights of sources that have one, by name."""
        return {s.name: s.weight for s in self.sources if s.weight is not None}

    @property
    def temperatures(self) -> dict[str, float]:
        """The temperatures of sources that have one, by name."""
        return {s.name: s.temperature for s in self.sources if s.temperature is not None}

    @property
    def weighs_sources(self) -> bool:
        """Whether sources are drawn by weight."""
        return bool(self.weights) or self.size_exponent != 1

    @property
    def split_names(self) -> tuple[str, ...]:
        """The splits that `prepare` makes."""
        return SPLITS if self.protocol == "random" else (*SPLITS, CONTROL)

    @property
    def counts_tokens(self) -> bool:
        """Whether a limit in tokens is set."""
        return self.min_tokens is not None or self.max_tokens is not None

    @property
    def local_folder(self) -> Path:
        """The folder, for code that writes into it. Raises ConfigError for a URL."""
        return require_local(self.folder)


def _protocol_fault(data: DataConfig) -> str:
    """Return why sizes and roles do not fit the protocol, with the cure; else an empty string."""
    sizes, roles = data.splits, {source.role for source in data.sources}
    if data.protocol == "random":
        if sizes.control:
            return (
                f"splits.control={sizes.control:g} needs protocol=knowledge; remove it, or set "
                "the protocol"
            )
        if not sizes.gl:
            return "splits.gl=0 leaves no records for stage 1; give it a size"
        if wrong := roles - {"pair", "eval"}:
            return f"role {min(wrong)} needs protocol=knowledge; remove it"
        if roles == {"eval"}:
            return "all sources have role eval, so there is nothing to train on; add a source"
        return ""
    if "eval" in roles:
        return "role eval needs protocol=random: protocol=knowledge chooses what it holds out"
    if sizes.gl:
        return (
            f"splits.gl={sizes.gl:g} is set automatically with protocol=knowledge (all facts); "
            "remove it"
        )
    if not sizes.control:
        return "splits.control=0, but protocol=knowledge needs a control set; give it a size"
    if data.sources and "both" not in roles and roles != {"pair", "fact"}:
        return (
            f"all sources have role {min(roles)}, but protocol=knowledge needs sources of role "
            "fact and of role pair, or one of role both"
        )
    return ""
