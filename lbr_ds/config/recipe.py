"""A recipe (YAML) and overrides (`a.b=c`) -> one immutable, validated `RunConfig`.

    run = load("demo", ["stage1.num_steps=10"])

Every key has one owner: batch, schedule, optimizer and clipping belong to the recipe;
`ds_configs/*.json` only lay out memory. Sizes that follow from others are properties. Every key has
a description, and every number has bounds. No torch import.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, ValidationError, model_validator

from lbr_ds.config.data import DataConfig
from lbr_ds.config.mining import MiningConfig
from lbr_ds.config.mixing import Mixing
from lbr_ds.config.model import BottleneckConfig, LoraConfig, ModelConfig
from lbr_ds.config.objectives import OBJECTIVES
from lbr_ds.config.operation import (
    CardConfig,
    EngineConfig,
    EvaluationConfig,
    EveryConfig,
    GuardConfig,
)
from lbr_ds.config.section import LocalPath, Section
from lbr_ds.config.synthesis import SynthesisConfig
from lbr_ds.config.training import Stage1Config, Stage2Config
from lbr_ds.config.validation import describe_error
from lbr_ds.errors import ConfigError, short
from lbr_ds.instructions import pooling_fault
from lbr_ds.system import resources
from lbr_ds.system.masking import mask_secrets
from lbr_ds.system.yaml_json import parse_yaml, read_yaml

_DECISIVE_IN_REPLAY = ("objective", "samples_per_step", "max_target_length", "bag_of_words")


class RunConfig(Section):
    """A resolved recipe: all settings of one run. Stored as `RUN/recipe.yaml`."""

    name: str = Field(
        min_length=1, max_length=200, description="Name of the run in reports and model cards."
    )
    run: LocalPath = Field(
        description="The run folder: checkpoints, metrics, evaluations. A relative path is "
        "relative to the working directory."
    )
    seed: int = Field(
        default=0,
        ge=0,
        lt=1 << 32,
        description="Seed of everything that is drawn: splits, sample order, dropout.",
    )
    model: ModelConfig
    bottleneck: BottleneckConfig = BottleneckConfig()
    lora: LoraConfig = LoraConfig()
    data: DataConfig
    stage1: Stage1Config
    stage2: Stage2Config
    mining: MiningConfig = MiningConfig()
    synthesis: SynthesisConfig = SynthesisConfig()
    engine: EngineConfig = EngineConfig()
    guard: GuardConfig = GuardConfig()
    every: EveryConfig = EveryConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    card: CardConfig = CardConfig()

    @model_validator(mode="after")
    def _sections_agree(self) -> RunConfig:
        model, count = self.model, self.bottleneck.count
        if model.max_length <= count + 1:
            raise ValueError(
                f"model.max_length={model.max_length} leaves no room for text besides "
                f"bottleneck.count={count}; raise max_length"
            )
        if fault := pooling_fault(model.pooling, model.pool_instruction, count):
            raise ValueError(fault)
        if self.stage2.patience is not None and self.every.evaluate is None:
            raise ValueError(
                "stage2.patience counts evaluations, and every.evaluate is null; set it to save or "
                "to a number of steps"
            )
        ib = [name for name in self.stage1.objective if OBJECTIVES[name].bottleneck]
        if ib and count == 0:
            raise ValueError(
                f"stage1.objective {ib[0]!r} needs a bottleneck; "
                "set bottleneck.count to 1 or more, or use objective plain_sft or plain_lm"
            )
        return self

    def stage(self, number: int) -> Stage1Config | Stage2Config:
        """Return the section of stage 1 or 2."""
        return self.stage1 if number == 1 else self.stage2

    def parts(self, number: int) -> tuple[int, ...]:
        """Return the stages whose losses stage 1 or 2 trains: of 2 also 1, where it is replayed."""
        return (2, 1) if number == 2 and self.stage2.generative else (number,)

    @property
    def separates_sources(self) -> bool:
        """Whether each shard must contain one source, because a stage draws by source."""
        return self.data.weighs_sources or self.stage2.homogeneous

    def mixing(self, stage: int) -> Mixing | None:
        """Return how a stage draws from several sources; None: all records alike."""
        homogeneous = stage == 2 and self.stage2.homogeneous
        if not (self.data.weighs_sources or homogeneous):
            return None
        return Mixing(self.data.weights, self.data.size_exponent, homogeneous)

    def keeps_best(self, stage: int) -> bool:
        """Return whether the best checkpoint of a stage is kept beside the newest ones."""
        chosen = stage == 2 or self.stage2.start_from == "best"
        return chosen and self.every.evaluate is not None

    def dump(self) -> str:
        """Return the resolved recipe as YAML, without secrets; `load` of it gives an equal run."""
        plain = json.loads(self.model_dump_json(by_alias=True))
        return yaml.safe_dump(plain, sort_keys=False)

    def result_settings(self, stage: int) -> dict[str, Any]:
        """Return the settings that decide the result of a stage; a resume must not change them.

        Left out are folders, how often things happen, and evaluation. The data has a fingerprint
        of its own, in its manifest.
        """
        other = {"run", "name", "every", "evaluation", "engine", "guard", "data", "card"}
        plain = json.loads(self.model_dump_json(exclude=other | {"mining", "synthesis"}))
        if self.guard.spike_sigmas is not None:
            plain["guard"] = {"spike_sigmas": self.guard.spike_sigmas}
        if self.lora.rank is None:
            plain.pop("lora")
        other_stage = plain.pop(f"stage{3 - stage}")
        if stage == 2 and self.stage2.generative:
            plain["stage1"] = {key: other_stage[key] for key in _DECISIVE_IN_REPLAY}
        if self.data.weighs_sources:
            plain["data"] = {
                "weights": self.data.weights,
                "size_exponent": self.data.size_exponent,
            }
        if stage == 2 and self.data.temperatures:
            plain["stage2"]["temperatures"] = self.data.temperatures
        for name in ("activation_checkpointing", "attention_kernel", "compile"):
            plain["model"].pop(name)
        for memory_only in ("micro_batch_tokens", "chunk_tokens", "patience"):
            plain[f"stage{stage}"].pop(memory_only, None)
        return plain


def load(recipe: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> RunConfig:
    """Read a recipe, apply overrides and validate the result.

    Args:
        recipe: path of a YAML file, or the name of a shipped recipe such as `demo`.
        overrides: `key.sub=value`, applied in order; a value is read as YAML.

    Raises:
        ConfigError: one line that names the key, the value and the cure.
    """
    path = resources.find_shipped("recipes", str(recipe), ".yaml")
    raw = read_yaml(path, "a recipe")
    for override in overrides:
        _apply_override(raw, override)
    try:
        return RunConfig.model_validate(raw)
    except ValidationError as error:
        origin = _origin(path, overrides, error)
        raise ConfigError(f"{origin}: {describe_error(error, RunConfig)}") from None


def _apply_override(raw: dict[str, Any], override: str) -> None:
    """Set one dotted key of a recipe in place."""
    key, equals, text = override.partition("=")
    origin = f"override {short(override, 100)!r}"
    if not equals or not all(key.split(".")):
        raise ConfigError(f"{origin} is not of the form key.sub=value")
    *parents, last = key.split(".")
    section = raw
    for name in parents:
        section = section.setdefault(name, {})
        if not isinstance(section, dict):
            raise ConfigError(
                f"{origin}: {name} is a list or a single value, so no key below it can be "
                f"overridden; change it in the recipe file, or override {name} as a whole"
            )
    section[last] = parse_yaml(text, origin)


def _origin(path: Path, overrides: list[str] | tuple[str, ...], error: ValidationError) -> str:
    """Return where the first wrong value came from: an override, or else the recipe file."""
    where = [str(part) for part in error.errors()[0]["loc"]]
    for override in reversed(overrides):
        key = override.partition("=")[0]
        if where[: key.count(".") + 1] == key.split("."):
            return f"override {short(mask_secrets(override), 100)!r}"
    return str(path)
