"""The sections `stage1` and `stage2`: objective, length, batch and optimizer of each stage."""

from __future__ import annotations

import difflib
import math
from typing import Annotated, Any, Literal

from pydantic import Field, WithJsonSchema, field_validator, model_validator

from lbr_ds.config.distillation import DistillationConfig
from lbr_ds.config.objectives import OBJECTIVES
from lbr_ds.config.section import MAX_COUNT, NameOrPath, Section
from lbr_ds.errors import ConfigError

_Beta = Annotated[float, Field(ge=0, lt=1)]
_Weight = Annotated[float, Field(gt=0, le=1e6)]
_Name: Any = Literal[tuple(OBJECTIVES)]  # for the schema alone
_Share = Annotated[float, Field(gt=0, le=1)]
_NameOrStep = Annotated[NameOrPath, WithJsonSchema({"type": ["string", "integer"]})]


class OptimConfig(Section):
    """AdamW with linear warm-up and cosine decay."""

    lr: float = Field(
        gt=0,
        le=10,
        description="Peak learning rate. LoRA needs about ten times that of full training.",
    )
    min_lr_ratio: float = Field(
        default=0.1,
        ge=0,
        le=1,
        json_schema_extra={"unit": "share of lr"},
        description="The cosine schedule ends at this fraction of lr.",
    )
    warmup_ratio: float = Field(
        default=0.05,
        ge=0,
        le=1,
        json_schema_extra={"unit": "share of the steps"},
        description="Fraction of the steps in which the learning rate rises from 0.",
    )
    weight_decay: float = Field(
        default=0.01,
        ge=0,
        le=10,
        description="Weight decay of matrices. Norms, biases and embeddings have none.",
    )
    betas: tuple[_Beta, _Beta] = Field(
        default=(0.9, 0.95), description="Adam's decay rates of the first and second moment."
    )
    eps: float = Field(
        default=1e-8, gt=0, le=1, description="Adam's constant against division by zero."
    )
    clip: float = Field(
        default=1.0,
        gt=0,
        le=1e30,
        description="Gradient clipping: the maximum global norm of the gradient.",
    )


class StageConfig(Section):
    """What both stages have in common."""

    num_steps: int | None = Field(
        default=None,
        ge=1,
        le=MAX_COUNT,
        json_schema_extra={"unit": "steps"},
        description="Length of the stage in optimizer steps. Give this or num_epochs.",
    )
    num_epochs: float | None = Field(
        default=None,
        gt=0,
        le=1e6,
        json_schema_extra={"unit": "epochs"},
        description="Length of the stage in passes over its split. Give this or num_steps.",
    )
    samples_per_step: int = Field(
        ge=1,
        le=1 << 24,
        json_schema_extra={"unit": "samples"},
        description="Samples in one optimizer step over all ranks (the global batch size). Must be "
        "a multiple of the number of ranks.",
    )
    micro_batch_tokens: Literal["auto"] | Annotated[int, Field(ge=16, le=MAX_COUNT)] = Field(
        default=8192,
        json_schema_extra={"unit": "tokens per rank"},
        description="Maximum number of tokens of one rank in one forward pass. It changes memory "
        "and speed, not the result. auto: the number that fits into memory and takes the least "
        "time, as `lbr-ds plan` predicts.",
    )
    optim: OptimConfig = Field(description="Optimizer and learning-rate schedule.")

    @model_validator(mode="after")
    def _one_length(self) -> StageConfig:
        if (self.num_steps is None) == (self.num_epochs is None):
            raise ValueError("give exactly one of num_steps and num_epochs")
        return self

    @property
    def micro_tokens(self) -> int:
        """`micro_batch_tokens` as a number. `auto` becomes one when training starts."""
        if self.micro_batch_tokens == "auto":
            raise ConfigError(
                "micro_batch_tokens=auto is chosen when training starts; give a number here"
            )
        return self.micro_batch_tokens

    def steps(self, num_samples: int) -> int:
        """Return the optimizer steps of the stage for a split of `num_samples` records."""
        if self.num_steps is not None:
            return self.num_steps
        assert self.num_epochs is not None
        return max(1, math.floor(self.num_epochs * num_samples / self.samples_per_step))


class Stage1Config(StageConfig):
    """IB-GL: learn the domain through the bottleneck (paper, section 3.2)."""

    objective: dict[str, _Weight] = Field(
        default_factory=lambda: {"ib_sft": 1.0},
        description="The training objective: ib_sft, ib_reconstruct, ib_continue, the control "
        "ib_uncut, or one without a bottleneck, plain_sft or plain_lm. A mixture is given by "
        "weights: {ib_sft: 2, ib_reconstruct: 1}.",
    )
    max_target_length: int = Field(
        default=512,
        ge=1,
        le=1 << 22,
        json_schema_extra={"unit": "tokens"},
        description="Maximum length of the target Y. Longer targets are truncated.",
    )
    bag_of_words: float = Field(
        default=0,
        ge=0,
        le=1e6,
        description="Weight of an additional loss with which the embedding predicts the tokens of "
        "Y all at once, without their order. 0: the paper's plain form.",
    )

    @field_validator(
        "objective", mode="before", json_schema_input_type=dict[_Name, _Weight] | _Name
    )
    @classmethod
    def _name_is_a_mixture_of_one(cls, value: Any) -> Any:
        return {value: 1.0} if isinstance(value, str) else value

    @field_validator("objective")
    @classmethod
    def _known_names(cls, value: dict[str, float]) -> dict[str, float]:
        for name in value:
            if name not in OBJECTIVES:
                near = difflib.get_close_matches(name, OBJECTIVES, 1)
                hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(OBJECTIVES)}"
                raise ValueError(f"unknown objective {name!r}; {hint}")
        if not value:
            raise ValueError(f"name at least one of {', '.join(OBJECTIVES)}")
        return value


class CropConfig(Section):
    """How long the two spans of a passage are (`stage2.pairs: crop`)."""

    query: tuple[_Share, _Share] = Field(
        default=(0.1, 0.5),
        json_schema_extra={"unit": "share of the passage"},
        description="Minimum and maximum length of the query, as shares of the passage's words (or "
        "of its letters in Chinese, Japanese, Thai and other scripts without spaces).",
    )
    positive: tuple[_Share, _Share] = Field(
        default=(0.1, 0.5),
        json_schema_extra={"unit": "share of the passage"},
        description="The same for the positive. [1, 1]: the whole passage.",
    )

    @model_validator(mode="after")
    def _in_order(self) -> CropConfig:
        for name in ("query", "positive"):
            low, high = getattr(self, name)
            if low > high:
                raise ValueError(f"{name}=[{low:g}, {high:g}]; give [shortest, longest]")
        return self


class Stage2Config(StageConfig):
    """GR-CL: align the bottleneck's states contrastively (paper, section 3.3)."""

    start_from: _NameOrStep = Field(
        default="best",
        alias="from",
        coerce_numbers_to_str=True,
        description="Weights to start from: best (the stage-1 checkpoint with the highest "
        "Separation Ratio on held-out data), last, the number of a stage-1 step such as 500, "
        "backbone (no stage 1), or a folder.",
    )
    pairs: Literal["given", "crop"] = Field(
        default="given",
        description="given: train on the queries and positives of the records. crop: also train on "
        "plain passages, of which two random spans are the query and the positive; every epoch "
        "draws new spans.",
    )
    crop: CropConfig = Field(
        default=CropConfig(), description="Lengths of the spans, for pairs: crop."
    )
    temperature: float = Field(default=0.02, ge=1e-4, le=100, description="Temperature of InfoNCE.")
    homogeneous: bool = Field(
        default=False,
        description="Draw all samples of a step from one source, so that in-batch negatives come "
        "from the same source. Each source must then have at least samples_per_step records.",
    )
    num_negatives: int = Field(
        default=0,
        ge=0,
        le=10_000,
        json_schema_extra={"unit": "negatives per record"},
        description="Hard negatives used per record, from its source or from `lbr-ds mine`. A "
        "record that has fewer uses all of them.",
    )
    false_negative_margin: float | None = Field(
        default=None,
        ge=-2,
        le=2,
        json_schema_extra={"unit": "cosine"},
        description="A candidate whose cosine to the query exceeds the positive's by more than "
        "this is not used as a negative; 0.1 is usual. null: no candidate is excluded by "
        "similarity.",
    )
    patience: int | None = Field(
        default=None,
        ge=1,
        le=MAX_COUNT,
        json_schema_extra={"unit": "evaluations"},
        description="Early stopping: end the stage after this many consecutive evaluations "
        "(every.evaluate) without a higher held-out nDCG@10. null: train all steps.",
    )
    matryoshka: dict[Annotated[int, Field(ge=1, le=1 << 20)], _Weight] = Field(
        default_factory=dict,
        description="Lengths to which vectors may be truncated (Matryoshka): the loss is also "
        "computed on these prefixes. In a list, as [256, 128, 64], each has the weight 1; a "
        "mapping, as {256: 1, 64: 0.5}, gives the weights. The whole vector has the weight 1.",
    )
    distillation: DistillationConfig = Field(
        default=DistillationConfig(), description="Distillation from a teacher."
    )
    generative: float = Field(
        default=0,
        ge=0,
        le=1e6,
        description="Replay against forgetting: weight of the loss of stage 1, which is added to "
        "the contrastive loss. Each step then also trains a batch of stage 1 (split gl, "
        "stage1.samples_per_step, stage1.objective). With from: backbone, one stage trains both "
        "losses from the start. 0: the contrastive loss alone.",
    )
    chunk_tokens: int | None = Field(
        default=None,
        ge=16,
        le=MAX_COUNT,
        json_schema_extra={"unit": "tokens per rank"},
        description="Maximum number of tokens of one rank in one forward pass of gradient caching, "
        "which is used when a step exceeds micro_batch_tokens. null: micro_batch_tokens.",
    )

    @field_validator(
        "matryoshka", mode="before", json_schema_input_type=dict[int, _Weight] | list[int]
    )
    @classmethod
    def _list_has_equal_weights(cls, value: Any) -> Any:
        if not isinstance(value, list):
            return value
        if len(set(map(str, value))) < len(value):
            raise ValueError("a length is given twice")
        return dict.fromkeys(value, 1.0)

    @model_validator(mode="after")
    def _candidates_for_the_teacher(self) -> Stage2Config:
        if self.distillation.by_scores and not self.num_negatives:
            raise ValueError(
                f"distillation.loss={self.distillation.loss} compares a query's positive with its "
                "hard negatives, and num_negatives is 0; raise num_negatives"
            )
        return self

    @model_validator(mode="after")
    def _chunk_within_micro_batch(self) -> Stage2Config:
        if self.chunk_tokens is None or self.micro_batch_tokens == "auto":
            return self
        if self.chunk_tokens > self.micro_batch_tokens:
            raise ValueError(
                f"chunk_tokens={self.chunk_tokens} exceeds "
                f"micro_batch_tokens={self.micro_batch_tokens}; a chunk is part of a micro-batch"
            )
        return self


def check_world(samples_per_step: int, world: int) -> None:
    """Raise ConfigError unless `world` ranks can share the samples of a step evenly."""
    if samples_per_step % world:
        below = samples_per_step // world * world
        either = f"{below} or {below + world}" if below else str(world)
        raise ConfigError(
            f"samples_per_step={samples_per_step} is not a multiple of world={world} ranks; "
            f"use {either}"
        )
