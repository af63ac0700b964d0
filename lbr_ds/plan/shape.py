"""Read a backbone's parameters from its config.json, one by one, without weights.

    shape = shape_of(run)
    shape.total, shape.tensors

Supported are decoders built like Llama (llama, mistral, qwen2, qwen3): embeddings, in each layer
attention and a gated MLP with two norms, a last norm, and a head that may be tied.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lbr_ds.config import LoraConfig, ModelConfig, RunConfig
from lbr_ds.errors import ConfigError
from lbr_ds.plan.flops import Sizes, sizes_of
from lbr_ds.system.yaml_json import read_json, read_yaml

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
_ROUND_TO = 64  # the rows of a table that is extended are rounded up to it (model/bottleneck.py)
_NEEDED = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "vocab_size",
)


@dataclass(frozen=True)
class Shape(Sizes):
    """The parameters of a decoder. `vocab` includes the rows of the bottleneck tokens.

    Attributes:
        name: the backbone's, for messages.
        tied: whether the head is the table of embeddings.
        config: the config.json that it was read from, changed as the sizes are.
        adapters: shapes of LoRA's matrices; without any, all weights are trainable.
        new_rows: with adapters, the rows of the bottleneck, which are trainable beside them.
    """

    name: str
    tied: bool
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    qk_norm: bool
    config: dict[str, Any]
    adapters: tuple[tuple[int, int], ...] = ()
    new_rows: int = 0

    @property
    def matrices(self) -> dict[str, tuple[int, int]]:
        """One layer's linear layers by name: (outputs, inputs)."""
        d, i = self.hidden, self.inner
        q, kv = self.heads * self.head_size, self.kv_heads * self.head_size
        return {
            "q_proj": (q, d),
            "k_proj": (kv, d),
            "v_proj": (kv, d),
            "o_proj": (d, q),
            "gate_proj": (i, d),
            "up_proj": (i, d),
            "down_proj": (d, i),
        }

    @property
    def layer(self) -> list[tuple[int, ...]]:
        """Shapes of one layer's parameters, without adapters."""
        d, i = self.hidden, self.inner
        q, kv = self.heads * self.head_size, self.kv_heads * self.head_size
        shapes: list[tuple[int, ...]] = [*self.matrices.values()]
        shapes += [(q,), (kv,), (kv,)] * self.qkv_bias + [(d,)] * self.out_bias
        shapes += [(self.head_size,)] * 2 * self.qk_norm + [(i,), (i,), (d,)] * self.mlp_bias
        return [*shapes, (d,), (d,)]

    @property
    def tensors(self) -> list[tuple[int, ...]]:
        """Shapes of all parameters; a tied head counts once."""
        tables = [(self.vocab, self.hidden)] * (1 if self.tied else 2)
        return [*tables, *self.layer * self.layers, (self.hidden,), *self._added]

    @property
    def trainable_tensors(self) -> list[tuple[int, ...]]:
        """Shapes of the parameters that have gradients and optimizer states."""
        return self._added or self.tensors

    @property
    def _added(self) -> list[tuple[int, ...]]:
        rows = [(self.new_rows, self.hidden)] if self.new_rows else []
        return [*self.adapters, *rows] if self.adapters else []

    @property
    def total(self) -> int:
        """Number of parameters."""
        return sum(math.prod(t) for t in self.tensors)

    @property
    def trainable(self) -> int:
        """Number of trainable parameters."""
        return sum(math.prod(t) for t in self.trainable_tensors)

    @property
    def decayed(self) -> int:
        """Number of parameters with weight decay; the others are a group of their own."""
        return self.adapter_parameters or self.body

    @property
    def adapter_parameters(self) -> int:
        """Number of parameters in the adapters; 0 if all weights are trainable."""
        return sum(math.prod(t) for t in self.adapters)

    @property
    def layer_parameters(self) -> int:
        """Number of parameters in one decoder layer, without adapters."""
        return sum(math.prod(t) for t in self.layer)

    def shard(self, world: int, above: int = 0) -> int:
        """Return the parameters of one rank's shard under ZeRO-3.

        Every tensor is divided evenly and rounded up.

        Args:
            world: number of ranks.
            above: count only tensors with more parameters than this.
        """
        return _divided((t for t in self.tensors if math.prod(t) > above), world)

    def trainable_shard(self, world: int) -> int:
        """Return the trainable parameters of one rank's shard."""
        return _divided(self.trainable_tensors, world)

    def persistent(self, threshold: int) -> int:
        """Return the parameters in tensors up to `threshold`, which ZeRO-3 keeps on every rank."""
        return sum(n for n in map(math.prod, self.tensors) if n <= threshold)


def _divided(tensors: Iterable[tuple[int, ...]], world: int) -> int:
    return sum(-(-math.prod(t) // world) for t in tensors)


def shape_of(run: RunConfig, config: Path | None = None) -> Shape:
    """Return the shape of a recipe's backbone with its bottleneck and its adapters.

    Args:
        run: the recipe.
        config: see `find_shape`.

    Raises:
        ConfigError: the shape cannot be found, or `lora.targets` names no layer of it.
    """
    shape = find_shape(run.model, run.bottleneck.count, config)
    return with_adapters(shape, run.lora, run.bottleneck.count)


def prepared_shape(run: RunConfig) -> Shape:
    """Return the shape of the run folder's prepared backbone, or of the recipe's if there is none.

    Raises:
        ConfigError: see `shape_of`.
    """
    prepared = run.run / "backbone" / "config.json"
    if not prepared.is_file():
        return shape_of(run)
    # It has the bottleneck's rows already.
    return with_adapters(find_shape(run.model, 0, prepared), run.lora, run.bottleneck.count)


def with_adapters(shape: Shape, lora: LoraConfig, new_rows: int) -> Shape:
    """Return the shape with the adapters that the recipe's `lora` section asks for, if any."""
    if (rank := lora.rank) is None:
        return shape
    if unknown := [name for name in lora.targets if name not in shape.matrices]:
        raise ConfigError(
            f"lora.targets: {unknown[0]!r} is not a linear layer of the backbone; choose from "
            f"{', '.join(shape.matrices)}"
        )
    sizes = [shape.matrices[name] for name in lora.targets or shape.matrices]
    added = [part for out, into in sizes for part in ((rank, into), (out, rank))] * shape.layers
    return dataclasses.replace(shape, adapters=tuple(added), new_rows=new_rows)


def find_shape(model: ModelConfig, num_bottleneck: int, config: Path | None = None) -> Shape:
    """Return the prepared backbone's shape, from its config.json alone; nothing is downloaded.

    The config is taken from the first of: `config`, the backbone if it is a folder, the hub's cache
    on this disk, and the table of the shipped recipes' backbones. A config does not say how many
    rows of a table are unused, so the K rows of the bottleneck are added as if none were (at most
    64 + K rows too many).

    Args:
        model: the recipe's `model` section.
        num_bottleneck: K; 0: a folder that has the bottleneck already.
        config: a config.json, or a folder with one.

    Raises:
        ConfigError: no config is found, or its architecture is not supported.
    """
    raw = _config(model, config)
    shape = shape_of_config(raw, model.backbone.split("/")[-1].split("#")[0])
    layers = model.num_layers or shape.layers
    if layers > shape.layers:
        raise ConfigError(f"model.num_layers={layers}, but the backbone has {shape.layers}")
    vocab = shape.vocab
    if num_bottleneck:
        vocab = -(-(vocab + num_bottleneck) // _ROUND_TO) * _ROUND_TO
    changed = {**shape.config, "num_hidden_layers": layers, "vocab_size": vocab}
    changed.pop("layer_types", None)
    return dataclasses.replace(shape, layers=layers, vocab=vocab, config=changed)


def shape_of_config(raw: dict[str, Any], name: str) -> Shape:
    """Return the shape that a config.json describes.

    Raises:
        ConfigError: the architecture is not supported, or a size is missing.
    """
    family = raw.get("model_type")
    if family not in FAMILIES:
        raise ConfigError(
            f"{name}: plan knows model_type {', '.join(FAMILIES)}, not {family!r}; "
            "measure with `lbr-ds train ... stage1.num_steps=2` instead"
        )
    for key in _NEEDED:
        if not isinstance(raw.get(key), int):
            raise ConfigError(f"{name}: its config.json has no whole number {key}")
    bias = family in ("llama", "qwen3") and bool(raw.get("attention_bias", False))
    return Shape(
        **vars(sizes_of(raw)),
        name=name,
        tied=bool(raw.get("tie_word_embeddings", False)),
        qkv_bias=family == "qwen2" or bias,
        out_bias=bias,
        mlp_bias=family == "llama" and bool(raw.get("mlp_bias", False)),
        qk_norm=family == "qwen3",
        config=raw,
    )


def known_backbones() -> dict[str, Any]:
    """Return shapes.yaml: the backbones of the shipped recipes by name."""
    return read_yaml(Path(__file__).with_name("shapes.yaml"), "the table")


def _config(model: ModelConfig, given: Path | None) -> dict[str, Any]:
    """Return the first config.json that exists (see `find_shape`)."""
    name = model.backbone
    if given is not None:
        return _read_config(given / "config.json" if given.is_dir() else given)
    if (Path(name) / "config.json").is_file():
        return _read_config(Path(name) / "config.json")
    if not name.startswith("wheel:") and (cached := _cached(name, model.revision)):
        return _read_config(cached)
    entry = known_backbones().get(name.split("#")[0])
    if entry is None:
        raise ConfigError(
            f"the shape of model.backbone={name!r} is not known here: it is no folder with a "
            "config.json and not in the hub's cache; give its config.json with --config FILE"
        )
    return dict(entry["config"])


def _cached(name: str, revision: str | None) -> Path | None:
    """Return the config.json of a hub model that is cached on this disk."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        path = try_to_load_from_cache(name, "config.json", revision=revision)
    except HFValidationError:
        return None
    return Path(path) if isinstance(path, str) else None


def _read_config(path: Path) -> dict[str, Any]:
    return read_json(path, "a config.json", ConfigError, "copy it again")
