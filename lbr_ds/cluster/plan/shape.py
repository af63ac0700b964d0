"""A backbone's config.json -> its parameters, one by one, without weights.

    shape = shape_of(run)
    shape.total, shape.tensors

Known: decoders built like Llama (llama, mistral, qwen2, qwen3): embeddings, per layer attention and
a gated MLP with two norms, a last norm, a head that may be tied.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lbr_ds.cluster import flops
from lbr_ds.config import LoraConfig, ModelConfig, RunConfig
from lbr_ds.errors import ConfigError
from lbr_ds.system.yaml_json import read_json, read_yaml

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
_ROUND_TO = 64  # a table that gets longer is rounded up so (model/bottleneck.py)
_NEEDED = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "vocab_size",
)


@dataclass(frozen=True)
class Shape:
    """Sizes of a decoder; `vocab` includes the bottleneck's rows. config: what they were read from,
    brought up to date with them. adapters: shapes of LoRA's matrices, beside which only the
    `new_rows` of the bottleneck learn; none: all learns."""

    name: str
    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    vocab: int
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
        """One layer's linear layers by name: (numbers out, numbers in)."""
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
        found: list[tuple[int, ...]] = [*self.matrices.values()]
        found += [(q,), (kv,), (kv,)] * self.qkv_bias + [(d,)] * self.out_bias
        found += [(self.head_size,)] * 2 * self.qk_norm + [(i,), (i,), (d,)] * self.mlp_bias
        return [*found, (d,), (d,)]

    @property
    def tensors(self) -> list[tuple[int, ...]]:
        """Shapes of all parameters; a tied head counts once."""
        tables = [(self.vocab, self.hidden)] * (1 if self.tied else 2)
        return [*tables, *self.layer * self.layers, (self.hidden,), *self._added]

    @property
    def learning(self) -> list[tuple[int, ...]]:
        """Shapes of the parameters that have gradients and an optimizer's states."""
        return self._added or self.tensors

    @property
    def _added(self) -> list[tuple[int, ...]]:
        rows = [(self.new_rows, self.hidden)] if self.new_rows else []
        return [*self.adapters, *rows] if self.adapters else []

    @property
    def total(self) -> int:
        """Numbers in all parameters."""
        return sum(math.prod(t) for t in self.tensors)

    @property
    def learnt(self) -> int:
        """Numbers in the parameters that learn."""
        return sum(math.prod(t) for t in self.learning)

    @property
    def decayed(self) -> int:
        """Numbers that weight decay applies to; the others are a group of their own."""
        return self.in_adapters or self.linear

    @property
    def in_adapters(self) -> int:
        """Numbers in the adapters' matrices; 0 where all weights learn."""
        return sum(math.prod(t) for t in self.adapters)

    @property
    def per_layer(self) -> int:
        """Numbers in one decoder layer, without adapters."""
        return sum(math.prod(t) for t in self.layer)

    @property
    def sizes(self) -> flops.Shape:
        """What FLOPs depend on."""
        names = [f.name for f in dataclasses.fields(flops.Shape)]
        return flops.Shape(**{name: getattr(self, name) for name in names})

    @property
    def table(self) -> int:
        """Numbers in the embeddings, or in the head."""
        return self.sizes.head

    @property
    def linear(self) -> int:
        """Numbers in the layers' matrices, without head and embeddings."""
        return self.sizes.body

    def sharded(self, world: int, above: int = 0) -> int:
        """Numbers of one rank's share under ZeRO-3: every tensor is cut evenly, rounded up.

        above: of tensors with more numbers than that.
        """
        return _cut((t for t in self.tensors if math.prod(t) > above), world)

    def learning_share(self, world: int) -> int:
        """The same of the parameters that learn."""
        return _cut(self.learning, world)

    def persistent(self, threshold: int) -> int:
        """Numbers in parameters of at most `threshold`, which ZeRO-3 keeps whole on every rank."""
        return sum(n for n in map(math.prod, self.tensors) if n <= threshold)


def _cut(tensors: Iterable[tuple[int, ...]], world: int) -> int:
    return sum(-(-math.prod(t) // world) for t in tensors)


def shape_of(run: RunConfig, config: Path | None = None) -> Shape:
    """`find` for a recipe, with its adapters. Raises ConfigError, also for unknown lora.targets."""
    return adapted(find(run.model, run.bottleneck.count, config), run.lora, run.bottleneck.count)


def adapted(shape: Shape, lora: LoraConfig, new_rows: int) -> Shape:
    """The same with the adapters that `lora` asks for, if it does."""
    if (rank := lora.rank) is None:
        return shape
    if unknown := [name for name in lora.targets if name not in shape.matrices]:
        raise ConfigError(
            f"lora.targets: {unknown[0]!r} is no linear layer of this backbone, which has "
            f"{', '.join(shape.matrices)}"
        )
    sizes = [shape.matrices[name] for name in lora.targets or shape.matrices]
    added = [part for out, into in sizes for part in ((rank, into), (out, rank))] * shape.layers
    return dataclasses.replace(shape, adapters=tuple(added), new_rows=new_rows)


def find(model: ModelConfig, num_bottleneck: int, config: Path | None = None) -> Shape:
    """The prepared backbone's shape, from its config.json alone; nothing is fetched.

    Looked for in: `config`, the backbone as a folder, the hub's cache on this disk, and the table
    of the shipped recipes' backbones. How many rows of a table are spare is not in a config, so the
    bottleneck's K rows are added to it as if none were (at most 64 + K rows too many).
    Raises ConfigError when there is no config, or one of another build.
    """
    raw = _config(model, config)
    shape = of_config(raw, model.backbone.split("/")[-1].split("#")[0])
    layers = model.num_layers or shape.layers
    if layers > shape.layers:
        raise ConfigError(f"model.num_layers={layers}, but the backbone has {shape.layers}")
    vocab = -(-(shape.vocab + num_bottleneck) // _ROUND_TO) * _ROUND_TO
    return resized(shape, layers=layers, vocab=vocab if num_bottleneck else shape.vocab)


def resized(shape: Shape, *, layers: int, vocab: int) -> Shape:
    """The same with other counts, in `config` too."""
    config = {**shape.config, "num_hidden_layers": layers, "vocab_size": vocab}
    config.pop("layer_types", None)
    return Shape(**{**vars(shape), "layers": layers, "vocab": vocab, "config": config})


def of_config(raw: dict[str, Any], name: str) -> Shape:
    """A config.json's content as a Shape. Raises ConfigError for a build that is not known."""
    family = raw.get("model_type")
    if family not in FAMILIES:
        raise ConfigError(
            f"{name}: plan knows model_type {', '.join(FAMILIES)}, not {family!r}; "
            "measure with `lbr-ds train ... stage1.num_steps=2` instead"
        )
    for key in _NEEDED:
        if not isinstance(raw.get(key), int):
            raise ConfigError(f"{name}: its config.json has no whole number {key}")
    heads = raw["num_attention_heads"]
    bias = family in ("llama", "qwen3") and bool(raw.get("attention_bias", False))
    return Shape(
        name=name,
        hidden=raw["hidden_size"],
        inner=raw["intermediate_size"],
        layers=raw["num_hidden_layers"],
        heads=heads,
        kv_heads=raw.get("num_key_value_heads") or heads,
        head_size=raw.get("head_dim")
        or (128 if family == "qwen3" else raw["hidden_size"] // heads),
        vocab=raw["vocab_size"],
        tied=bool(raw.get("tie_word_embeddings", False)),
        qkv_bias=family == "qwen2" or bias,
        out_bias=bias,
        mlp_bias=family == "llama" and bool(raw.get("mlp_bias", False)),
        qk_norm=family == "qwen3",
        config=raw,
    )


def known_backbones() -> dict[str, Any]:
    """shapes.yaml: the backbones of the shipped recipes."""
    return read_yaml(Path(__file__).with_name("shapes.yaml"), "the table")


def _config(model: ModelConfig, given: Path | None) -> dict[str, Any]:
    """The first config.json that there is."""
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
    """config.json of a hub model that lies on this disk."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(name, "config.json", revision=revision)
    except HFValidationError:
        return None
    return Path(found) if isinstance(found, str) else None


def _read_config(path: Path) -> dict[str, Any]:
    return read_json(path, "a config.json", ConfigError, "copy it again")
