"""Recipe YAML + `a.b=c` overrides -> one frozen, checked `RunConfig`.

    run = load("demo", ["stage1.num_steps=10"])

One owner per key: batch, schedule, optimizer and clipping live here; `ds_configs/*.json` say only
how memory is laid out. Sizes that follow from others are properties. Every number has
bounds. No torch import.
"""

from __future__ import annotations

import difflib
import json
import math
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from lbr_ds.config.data import (
    KNOWLEDGE_SIZES,
    MANY,
    CardConfig,
    MiningConfig,
    Section,
    SourceConfig,
    SplitConfig,
    _protocol_fault,
)
from lbr_ds.config.objectives import OBJECTIVES
from lbr_ds.config.validation import describe_error
from lbr_ds.errors import ConfigError, short
from lbr_ds.instructions import pooling_fault
from lbr_ds.system import resources
from lbr_ds.system.masking import mask_secrets
from lbr_ds.system.urls import CACHE_GIB, Folder, LocalPath, Place, require_local
from lbr_ds.system.yaml_json import apply_override, read_yaml

SPLITS = ("gl", "cl", "eval")
CONTROL = "control"  # a fourth, under protocol knowledge
Beta = Annotated[float, Field(ge=0, lt=1)]
Weight = Annotated[float, Field(gt=0, le=1e6)]


class ModelConfig(Section):
    """The backbone and how a text becomes one vector. Read by `model/` and `batching/`."""

    backbone: Place  # hub name, folder, or wheel:NAME==VERSION/FILE#sha256=... (see locate.py)
    revision: str | None = None
    num_layers: int | None = Field(default=None, ge=1, le=10_000)  # keep only the first n
    attention: Literal["causal", "bidirectional"] = "causal"  # bidirectional: stage-2 baseline
    pooling: Literal["last", "mean"] = "last"  # last: the last bottleneck token (the method)
    pool_instruction: bool = True  # mean: whether an instruction's tokens count; last: no effect
    max_length: int = Field(default=512, ge=8, le=1 << 22)  # tokens of a text, with bottleneck
    activation_checkpointing: bool = True
    trust_remote_code: bool = False


class BottleneckConfig(Section):
    """The tokens that all of X must pass through. count 0: a plain backbone (baselines)."""

    count: int = Field(default=4, ge=0, le=256)


class LoraConfig(Section):
    """Low-rank adapters in place of full training, in both stages. Read by `model/lora.py`."""

    rank: int | None = Field(default=None, ge=1, le=1 << 20)  # null: all weights learn
    alpha: float = Field(default=32, gt=0, le=1e6)  # adapters count alpha / rank times
    dropout: float = Field(default=0, ge=0, lt=1)  # of what goes into an adapter
    targets: tuple[str, ...] = ()  # names of linear layers; empty: all of the decoder's


class DataConfig(Section):
    """Raw corpora and the folder of prepared shards. Read by `corpora/` and `shards/`."""

    folder: Folder  # DATA: gl/, cl/, eval/, manifest.json, curation.json; a path or a URL
    cache_gib: float = Field(default=CACHE_GIB, gt=0, le=1e9)  # disk for the shards of a URL
    sources: list[SourceConfig] = Field(default_factory=list)
    # random: the paper's. knowledge: facts of all entities in stage 1, pairs of some in stage 2, of
    # others in eval, and a control set whose facts are nowhere (corpora/curate/knowledge.py).
    protocol: Literal["random", "knowledge"] = "random"
    splits: SplitConfig = SplitConfig()
    min_chars: int = Field(default=1, ge=1, le=MANY)  # a text shorter than this drops its record
    max_chars: int = Field(default=20_000, ge=1, le=MANY)  # a longer text drops its record
    # The same in tokens of the backbone's own tokenizer, without bottleneck; null: no bound.
    min_tokens: int | None = Field(default=None, ge=1, le=MANY)
    max_tokens: int | None = Field(default=None, ge=1, le=MANY)
    languages: tuple[str, ...] = ()  # [en]: texts surely in another one go; empty: all stay
    near_duplicate: float = Field(default=0.7, ge=0.6, le=1)  # shared word pairs; 1: equal ones
    records_per_shard: int = Field(default=4096, ge=1, le=MANY)
    on_error: Literal["strict", "skip"] = "strict"  # bad records: stop, or skip and count
    workers: int = Field(default=1, ge=0, le=1024)  # processes a rank that build batches ahead

    @model_validator(mode="before")
    @classmethod
    def _sizes_of_the_protocol(cls, raw: Any) -> Any:
        if isinstance(raw, dict) and raw.get("protocol") == "knowledge":
            sizes = raw.get("splits", {})
            if isinstance(sizes, dict) and not sizes.get("gl"):
                raw = {**raw, "splits": {**KNOWLEDGE_SIZES, **sizes}}
        return raw

    @model_validator(mode="after")
    def _protocol_fits(self) -> DataConfig:
        if fault := _protocol_fault(self.protocol, self.splits, self.sources):
            raise ValueError(fault)
        return self

    @property
    def split_names(self) -> tuple[str, ...]:
        """The splits that `prepare` makes."""
        return SPLITS if self.protocol == "random" else (*SPLITS, CONTROL)

    @property
    def counts_tokens(self) -> bool:
        """Whether a bound in tokens is set."""
        return self.min_tokens is not None or self.max_tokens is not None

    @property
    def local_folder(self) -> Path:
        """The folder, for what writes into it. Raises ConfigError for a URL."""
        return require_local(self.folder)


class OptimConfig(Section):
    """AdamW and its schedule. Read by `train/optim.py`."""

    lr: float = Field(gt=0, le=10)
    min_lr_ratio: float = Field(default=0.1, ge=0, le=1)  # the cosine ends at lr times this
    warmup_ratio: float = Field(default=0.05, ge=0, le=1)  # share of the steps with rising lr
    # Of matrices only; not of norms, biases, embeddings.
    weight_decay: float = Field(default=0.01, ge=0, le=10)
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    eps: float = Field(default=1e-8, gt=0, le=1)
    clip: float = Field(default=1.0, gt=0, le=1e30)  # global gradient norm


class StageConfig(Section):
    """What both stages have. A step is `samples_per_step` samples over all ranks together."""

    num_steps: int | None = Field(default=None, ge=1, le=MANY)
    num_epochs: float | None = Field(default=None, gt=0, le=1e6)
    samples_per_step: int = Field(ge=1, le=1 << 24)
    micro_batch_tokens: int = Field(default=8192, ge=16, le=MANY)  # a rank's tokens in one forward
    optim: OptimConfig

    @model_validator(mode="after")
    def _one_length(self) -> StageConfig:
        if (self.num_steps is None) == (self.num_epochs is None):
            raise ValueError("give exactly one of num_steps and num_epochs")
        return self

    def steps(self, num_samples: int) -> int:
        """Optimizer steps of the stage for a split of `num_samples` records."""
        if self.num_steps is not None:
            return self.num_steps
        assert self.num_epochs is not None
        return max(1, math.floor(self.num_epochs * num_samples / self.samples_per_step))


class Stage1Config(StageConfig):
    """IB-GL: learn the domain through the bottleneck (paper, section 3.2)."""

    objective: dict[str, Weight] = Field(default_factory=lambda: {"ib_sft": 1.0})  # name: weight
    max_target_length: int = Field(default=512, ge=1, le=1 << 22)  # tokens of Y
    bag_of_words: float = Field(default=0, ge=0, le=1e6)  # weight of a loss on Y's words

    @field_validator("objective", mode="before")
    @classmethod
    def _name_is_a_mixture_of_one(cls, value: Any) -> Any:
        return {value: 1.0} if isinstance(value, str) else value

    @field_validator("objective")
    @classmethod
    def _known(cls, value: dict[str, float]) -> dict[str, float]:
        for name in value:
            if name not in OBJECTIVES:
                near = difflib.get_close_matches(name, OBJECTIVES, 1)
                hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(OBJECTIVES)}"
                raise ValueError(f"unknown objective {name!r}; {hint}")
        if not value:
            raise ValueError(f"name at least one of {', '.join(OBJECTIVES)}")
        return value


class Stage2Config(StageConfig):
    """GR-CL: align the bottleneck's states contrastively (paper, section 3.3)."""

    # best (of the stage-1 checkpoints, by Separation Ratio), last, a stage-1 step, backbone, folder
    start_from: Place = Field(default="best", alias="from", coerce_numbers_to_str=True)
    temperature: float = Field(default=0.02, ge=1e-4, le=100)
    num_negatives: int = Field(default=0, ge=0, le=10_000)  # mined ones, taken from each record
    # A candidate whose cosine exceeds the own positive's by more than this is no negative
    # (objectives/contrastive.py); 0.1 is usual, None drops none for being near.
    false_negative_margin: float | None = Field(default=None, ge=-2, le=2)
    # A rank's tokens in one forward once its share of a step exceeds micro_batch_tokens and goes
    # through gradient caching; None: micro_batch_tokens.
    chunk_tokens: int | None = Field(default=None, ge=16, le=MANY)

    @model_validator(mode="after")
    def _chunk_within_micro_batch(self) -> Stage2Config:
        if self.chunk_tokens is not None and self.chunk_tokens > self.micro_batch_tokens:
            raise ValueError(
                f"chunk_tokens={self.chunk_tokens} exceeds "
                f"micro_batch_tokens={self.micro_batch_tokens}; a chunk is part of a micro-batch"
            )
        return self


class EngineConfig(Section):
    """Read by `train/deepspeed/engine.py`."""

    ds_config: Place = "auto"  # a shipped name or a path; auto: zero3, without a GPU zero3_cpu
    # So long without progress of any rank, and the run ends; a week at most.
    timeout_minutes: float = Field(default=30, gt=0, le=10_080)


class GuardConfig(Section):
    """When an update is left out, and when that ends the run. Read by `train/guard.py`."""

    max_skipped: int = Field(default=3, ge=0, le=MANY)  # in a row; one more ends the run
    max_skipped_total: int = Field(default=100, ge=0, le=MANY)  # in all; one more ends the run
    # 6: loss or norm so far above the mean
    spike_sigmas: float | None = Field(default=None, gt=0, le=1e6)


class EvaluationConfig(Section):
    """The held-out sample, drawn by seed, that training is judged on (`train/held_out.py`)."""

    max_queries: int | None = Field(default=200, ge=1, le=MANY)  # null: all
    # More only if more are right answers.
    max_passages: int | None = Field(default=2000, ge=1, le=MANY)


class EveryConfig(Section):
    """What happens how often, in optimizer steps. Read by `train/loop.py`."""

    log: int = Field(default=1, ge=1, le=MANY)
    # on held-out data: save: at every save; n: every n steps too; null: never.
    evaluate: Literal["save"] | Annotated[int, Field(ge=1, le=MANY)] | None = "save"
    save: int = Field(default=500, ge=1, le=MANY)
    keep: int = Field(default=2, ge=1, le=MANY)  # newest checkpoints; and stage 1's best if needed
    # And those of every so many steps, for good.
    keep_every: int | None = Field(default=None, ge=1, le=MANY)
    save_async: bool = True  # write in the background, from a copy of the state in host memory


class RunConfig(Section):
    """One run: both stages, all rooms. Written to `RUN/recipe.yaml` before anything else."""

    name: str = Field(min_length=1, max_length=200)
    run: LocalPath  # the run folder
    seed: int = Field(default=0, ge=0, lt=1 << 32)  # as large as numpy's and torch's allow
    model: ModelConfig
    bottleneck: BottleneckConfig = BottleneckConfig()
    lora: LoraConfig = LoraConfig()
    data: DataConfig
    stage1: Stage1Config
    stage2: Stage2Config
    mining: MiningConfig = MiningConfig()
    engine: EngineConfig = EngineConfig()
    guard: GuardConfig = GuardConfig()
    every: EveryConfig = EveryConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    card: CardConfig = CardConfig()

    @model_validator(mode="after")
    def _rooms_agree(self) -> RunConfig:
        if self.model.max_length <= self.bottleneck.count + 1:
            raise ValueError(
                f"model.max_length={self.model.max_length} leaves no room for text beside "
                f"bottleneck.count={self.bottleneck.count}; raise max_length"
            )
        model, count = self.model, self.bottleneck.count
        if fault := pooling_fault(model.pooling, model.pool_instruction, count):
            raise ValueError(fault)
        ib = [name for name in self.stage1.objective if OBJECTIVES[name].bottleneck]
        if ib and self.bottleneck.count == 0:
            raise ValueError(
                f"stage1.objective {ib[0]!r} needs a bottleneck; "
                "set bottleneck.count to 1 or more, or use objective plain_sft or plain_lm"
            )
        return self

    def stage(self, number: int) -> Stage1Config | Stage2Config:
        """The part of stage 1 or 2."""
        return self.stage1 if number == 1 else self.stage2

    def dump(self) -> str:
        """The resolved recipe as YAML; `load` of it gives an equal RunConfig."""
        plain = json.loads(self.model_dump_json(by_alias=True))
        return yaml.safe_dump(plain, sort_keys=False)

    def decisive(self, stage: int) -> dict[str, Any]:
        """All in the recipe that decides a stage's numbers: no folders, no `every`, no evaluation.

        A resume must find it unchanged. The data has a fingerprint of its own, in its manifest.
        """
        apart = {"run", "name", "every", "evaluation", "engine", "guard", "data", "mining", "card"}
        plain = json.loads(self.model_dump_json(exclude=apart))
        if self.guard.spike_sigmas is not None:
            plain["guard"] = {"spike_sigmas": self.guard.spike_sigmas}
        if self.lora.rank is None:
            plain.pop("lora")
        plain.pop(f"stage{3 - stage}")
        plain["model"].pop("activation_checkpointing")
        for memory_only in ("micro_batch_tokens", "chunk_tokens"):
            plain[f"stage{stage}"].pop(memory_only, None)
        return plain


def load(recipe: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> RunConfig:
    """The recipe (a path, or a shipped name such as `demo`) with `a.b=c` overrides applied.

    Raises ConfigError with one line that names the key, the value and the cure.
    """
    path = resources.find_shipped("recipes", str(recipe), ".yaml")
    raw = read_yaml(path, "a recipe")
    for override in overrides:
        apply_override(raw, override)
    try:
        return RunConfig.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(_describe_fault(path, overrides, error)) from None


def _describe_fault(
    path: Path, overrides: list[str] | tuple[str, ...], error: ValidationError
) -> str:
    """The line for a fault of a recipe, which names the override that the value came from."""
    where = str(path)
    at = [str(part) for part in error.errors()[0]["loc"]]
    for override in reversed(overrides):
        key = override.partition("=")[0]
        if at[: key.count(".") + 1] == key.split("."):
            where = f"override {short(mask_secrets(override), 100)!r}"
            break
    return f"{where}: {describe_error(error, RunConfig)}"
