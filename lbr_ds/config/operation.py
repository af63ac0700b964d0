"""The sections about the operation of a run: engine, guard, intervals, evaluation, model card."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from lbr_ds.config.section import MAX_COUNT, NameOrPath, Section


class EngineConfig(Section):
    """DeepSpeed and the ranks."""

    ds_config: NameOrPath = Field(
        default="auto",
        description="Memory layout for DeepSpeed: a name from ds_configs/ or a path. auto: the "
        "fastest that fits into memory by `lbr-ds plan`; on GPUs in bf16, on CPU ranks in fp32.",
    )
    memory_gib: float | None = Field(
        default=None,
        gt=0,
        le=1e6,
        json_schema_extra={"unit": "GiB per rank"},
        description="Memory of a rank that keys set to auto plan with. null: that of its GPU, or "
        "its share of the free host memory.",
    )
    timeout_minutes: float = Field(
        default=30,
        gt=0,
        le=10_080,
        json_schema_extra={"unit": "minutes"},
        description="Minutes without progress of any rank after which the run ends.",
    )


class GuardConfig(Section):
    """When an update is skipped, and when skipped updates end the run."""

    max_skipped: int = Field(
        default=3,
        ge=0,
        le=MAX_COUNT,
        json_schema_extra={"unit": "updates"},
        description="Updates in a row that may be skipped; one more ends the run.",
    )
    max_skipped_total: int = Field(
        default=100,
        ge=0,
        le=MAX_COUNT,
        json_schema_extra={"unit": "updates"},
        description="Updates in all that may be skipped; one more ends the run.",
    )
    spike_sigmas: float | None = Field(
        default=None,
        gt=0,
        le=1e6,
        json_schema_extra={"unit": "standard deviations"},
        description="Also skip an update whose loss or gradient norm is this many standard "
        "deviations above the mean of the last 128 steps; 6 is usual. null: only updates that are "
        "not finite.",
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
        description="Where metrics, the recipe and retrieved passages go beside metrics.jsonl. "
        "wandb and mlflow read their servers and keys from the environment (WANDB_MODE=offline, "
        "MLFLOW_TRACKING_URI); pip install accelerate wandb mlflow.",
    )
    evaluate: Literal["save"] | Annotated[int, Field(ge=1, le=MAX_COUNT)] | None = Field(
        default="save",
        json_schema_extra={"unit": "steps"},
        description="When to evaluate on held-out data: save (before every checkpoint), a number "
        "(every so many steps too), or null (never).",
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
        description="Newest checkpoints that are kept. Stage 1's best one is also kept while "
        "stage2.from is best.",
    )
    keep_every: int | None = Field(
        default=None,
        ge=1,
        le=MAX_COUNT,
        json_schema_extra={"unit": "steps"},
        description="Also keep the checkpoints of every so many steps for good. null: none.",
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
        description="Most queries. null: all.",
    )
    max_passages: int | None = Field(
        default=2000,
        ge=1,
        le=MAX_COUNT,
        json_schema_extra={"unit": "passages"},
        description="Most passages; more only if more are right answers. null: all.",
    )


class CardConfig(Section):
    """What the model card of an export states beyond what follows from the run."""

    base_model: str | None = Field(
        default=None,
        description="Hub name of the base model. null: model.backbone, if that is one.",
    )
    license: str | None = Field(
        default=None,
        description="Licence of the weights as the hub spells it: apache-2.0, llama3.2.",
    )
    language: tuple[str, ...] = Field(
        default=(), description="ISO 639 codes. Empty: data.languages."
    )
    intended_use: str = Field(
        default="", description="A sentence or two about what the model is for."
    )
