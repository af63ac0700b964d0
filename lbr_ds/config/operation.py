"""The sections `engine`, `guard`, `every`, `evaluation` and `card`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from lbr_ds.config.section import MAX_COUNT, NameOrPath, Section


class EngineConfig(Section):
    """DeepSpeed and the ranks."""

    ds_config: NameOrPath = Field(
        default="auto",
        description="Memory layout for DeepSpeed: a name from ds_configs/ or a path. auto: the "
        "fastest layout that fits into memory, as `lbr-ds plan` predicts; in bf16 on GPUs and in "
        "fp32 on CPU ranks.",
    )
    memory_gib: float | None = Field(
        default=None,
        gt=0,
        le=1e6,
        json_schema_extra={"unit": "GiB per rank"},
        description="Memory of a rank, for choosing the values of keys that are auto. null: the "
        "memory of its GPU, or its share of the free host memory.",
    )
    timeout_minutes: float = Field(
        default=30,
        gt=0,
        le=10_080,
        json_schema_extra={"unit": "minutes"},
        description="The run ends after this many minutes in which no rank makes progress. "
        "Reading and writing files is progress, so a checkpoint may take longer to save.",
    )


class GuardConfig(Section):
    """When an update is skipped, and when skipped updates end the run."""

    max_skipped: int = Field(
        default=3,
        ge=0,
        le=MAX_COUNT,
        json_schema_extra={"unit": "updates"},
        description="Maximum number of consecutive updates that are skipped; one more ends the "
        "run.",
    )
    max_skipped_total: int = Field(
        default=100,
        ge=0,
        le=MAX_COUNT,
        json_schema_extra={"unit": "updates"},
        description="Maximum number of updates that are skipped in total; one more ends the run.",
    )
    spike_sigmas: float | None = Field(
        default=None,
        gt=0,
        le=1e6,
        json_schema_extra={"unit": "standard deviations"},
        description="Also skip an update whose loss or gradient norm is this many standard "
        "deviations above the mean of the last 128 steps; 6 is usual. null: skip only updates "
        "whose loss or gradient is not finite.",
    )


class EveryConfig(Section):
    """What happens how often, in optimizer steps."""

    log: int = Field(
        default=1,
        ge=1,
        le=MAX_COUNT,
        json_schema_extra={"unit": "steps"},
        description="Steps between two lines of the log.",
    )
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = Field(
        default=("tensorboard",),
        description="Experiment trackers that get metrics, the recipe and retrieved passages, in "
        "addition to metrics.jsonl. wandb and mlflow read their servers and keys from the "
        "environment (WANDB_MODE=offline, MLFLOW_TRACKING_URI) and need the extra "
        "`trackers`.",
    )
    evaluate: Literal["save"] | Annotated[int, Field(ge=1, le=MAX_COUNT)] | None = Field(
        default="save",
        json_schema_extra={"unit": "steps"},
        description="When to evaluate on held-out data. save: before every checkpoint. A number: "
        "also after every such number of steps. null: never.",
    )
    save: int = Field(
        default=500,
        ge=1,
        le=MAX_COUNT,
        json_schema_extra={"unit": "steps"},
        description="Steps between two checkpoints.",
    )
    keep: int = Field(
        default=2,
        ge=1,
        le=MAX_COUNT,
        json_schema_extra={"unit": "checkpoints"},
        description="How many of the newest checkpoints are kept. The best checkpoint of stage 2, "
        "and that of stage 1 if stage2.from is best, is kept too (unless every.evaluate is null).",
    )
    keep_every: int | None = Field(
        default=None,
        ge=1,
        le=MAX_COUNT,
        json_schema_extra={"unit": "steps"},
        description="Also keep every checkpoint whose step is a multiple of this number. null: "
        "none.",
    )
    save_async: bool = Field(
        default=True,
        description="Write checkpoints in the background, from a copy of the state in host memory "
        "(12 bytes per parameter of the rank's share).",
    )


class EvaluationConfig(Section):
    """The sample of held-out data that training is evaluated on, drawn by seed."""

    max_queries: int | None = Field(
        default=200,
        ge=1,
        le=MAX_COUNT,
        json_schema_extra={"unit": "queries"},
        description="Maximum number of queries. null: all.",
    )
    max_passages: int | None = Field(
        default=2000,
        ge=1,
        le=MAX_COUNT,
        json_schema_extra={"unit": "passages"},
        description="Maximum number of passages; exceeded only if more passages than this are "
        "right answers. null: all.",
    )


class CardConfig(Section):
    """What the model card of an export states and the run does not contain."""

    base_model: str | None = Field(
        default=None,
        description="Hub name of the base model. null: model.backbone, if that is a hub name.",
    )
    license: str | None = Field(
        default=None,
        description="Licence of the weights as the hub spells it, for example apache-2.0.",
    )
    language: tuple[str, ...] = Field(
        default=(), description="ISO 639 codes. Empty: data.languages."
    )
    intended_use: str = Field(
        default="", description="A sentence or two about what the model is for."
    )
