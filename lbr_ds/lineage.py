"""What a model was made from and what it was trained on: `lineage.json`, which travels with it.

    found = lineage.load(folder)      # RUN/backbone, RUN/stageN, a checkpoint's model, an export
    found.backbone.differences(other)  # ["weights: 3f2a90c1 -> 77bc01de"]
    lineage.unite([first, second])     # of a model that is made from two

A backbone is identified by its content, so it may be moved or renamed, and a changed file at the
same path is noticed. The hashes of the training texts are stored beside it
(`corpora/curate/trained_texts.py`).
This module does not import torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from lbr_ds.config import CONTROL, SPLITS, BottleneckConfig, ModelConfig
from lbr_ds.config.section import Section
from lbr_ds.config.validation import describe_error
from lbr_ds.errors import CheckpointError, LbrError
from lbr_ds.shards import Manifest
from lbr_ds.system.atomic import write_text
from lbr_ds.system.locate import cached_sha256, locate
from lbr_ds.system.masking import mask_secrets
from lbr_ds.system.urls import public_url

NAME = "lineage.json"
_SHOWN = 8  # digits of a hash in messages
_HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt"]
# Keys of config.json that say who wrote it, and nothing about the model.
_WRITERS = ("_name_or_path", "transformers_version")
_VOCABULARIES = (
    "tokenizer.model",
    "spiece.model",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "added_tokens.json",
)
_SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token")


class Backbone(Section):
    """A pretrained model by its content: sha256 of its config, tokenizer and weights."""

    name: str  # as the recipe names it
    num_layers: int | None = None  # of its decoder layers, those that were kept
    config: str
    tokenizer: str
    weights: str

    def differences(self, other: Backbone) -> list[str]:
        """`weights: OLD -> NEW` for each part that differs; empty when the content is equal."""
        found = []
        for part in ("num_layers", "config", "tokenizer", "weights"):
            old, new = getattr(self, part), getattr(other, part)
            if old != new:
                found.append(f"{part}: {_short(old)} -> {_short(new)}")
        return found


class Bottleneck(Section):
    """How a text becomes a vector, as in the recipe's `bottleneck` and `model`."""

    count: int
    attention: str
    pooling: str
    max_length: int
    separator: str = "eos"

    @classmethod
    def of(cls, model: ModelConfig, bottleneck: BottleneckConfig) -> Bottleneck:
        """Return the bottleneck of a recipe."""
        return cls(
            count=bottleneck.count,
            attention=model.attention,
            pooling=model.pooling,
            max_length=model.max_length,
            separator=bottleneck.separator,
        )


class Source(Section):
    """A corpus that data was prepared from: where it is from and under which licence.

    path: as in the recipe, where that is an address and not a place on some disk.
    """

    name: str
    path: str = ""
    license: str = ""
    origin: str = ""
    sha256: str = ""


class Dataset(Section):
    """Prepared data: its fingerprint, and what a model card says about it.

    splits: records of each. leaks: texts that a held-out split shares with a training split.
    eval_texts_in_gl: under protocol knowledge, what stage 1's texts state of what `eval` asks.
    """

    name: str
    place: str
    fingerprint: str
    protocol: str
    splits: dict[str, int]
    sources: tuple[Source, ...] = ()
    leaks: dict[str, int] = Field(default_factory=dict)
    eval_texts_in_gl: dict[str, int] = Field(default_factory=dict)

    @property
    def prepared(self) -> str:
        """The part of the fingerprint that `prepare` gave, as of `Manifest`."""
        return self.fingerprint.rpartition("-")[2]

    @classmethod
    def of(cls, place: Path | str) -> Dataset:
        """Describe a prepared folder or its URL. Raises DataError when there is none."""
        manifest = Manifest.load(place)
        try:
            curation = json.loads(manifest.beside("curation.json") or b"{}")
        except ValueError:
            curation = {}
        splits = [name for name in (*SPLITS, CONTROL) if name in manifest.splits]
        sources = [
            {**source, "path": source["path"] if ":" in source.get("path", "") else ""}
            for source in manifest.sources
            if source.get("format") != "mine"
        ]
        return cls(
            name=Path(public_url(place)).name,
            place=public_url(place),
            fingerprint=manifest.fingerprint,
            protocol=manifest.protocol,
            splits={name: manifest.records(name) for name in splits},
            sources=tuple(
                Source(**{name: source.get(name, "") for name in Source.model_fields})
                for source in sources
            ),
            leaks=curation.get("leaks", {}),
            eval_texts_in_gl=curation.get("eval_texts_in_gl", {}),
        )


class Training(Section):
    """One stage of training: `steps` optimizer steps on a split of a dataset.

    dimensions: lengths to which vectors may be truncated (`stage2.matryoshka`), longest first.
    replayed: the split of the batches of stage 1 that stage 2 trained as well.
    """

    stage: int
    split: str
    steps: int
    samples: int
    data: Dataset
    dimensions: tuple[int, ...] = ()
    replayed: str = ""


class Lineage(Section):
    """A model's backbones, the first one first, and all that was trained since, oldest first.

    A model that starts from an export has that export as its last backbone, after those that the
    export was made from.
    """

    version: Literal[1] = 1
    backbones: tuple[Backbone, ...]
    bottleneck: Bottleneck
    history: tuple[Training, ...] = ()

    def trained(self, training: Training, *, resumed: bool = False) -> Lineage:
        """Return this lineage with `training` appended.

        resumed: replace the last training if it is the same stage on the same data.
        """
        past = self.history
        if resumed and past and _same(past[-1], training):
            past = past[:-1]
        return self.model_copy(update={"history": (*past, training)})

    @property
    def backbone(self) -> Backbone | None:
        """The last one, which the weights started from; None where it could not be identified."""
        return self.backbones[-1] if self.backbones else None

    def descends_from(self, backbone: Backbone) -> bool:
        """Whether one of the backbones has this content."""
        return any(not own.differences(backbone) for own in self.backbones)

    @property
    def datasets(self) -> list[Dataset]:
        """Each dataset of the history once, as it was used last."""
        return list({training.data.prepared: training.data for training in self.history}.values())

    @property
    def dimensions(self) -> tuple[int, ...]:
        """Lengths to which the model's vectors may be truncated; its last training counts."""
        return self.history[-1].dimensions if self.history else ()

    def save(self, folder: Path) -> None:
        """Write `folder/lineage.json`, whole or not at all."""
        write_text(folder / NAME, self.model_dump_json(indent=1) + "\n")


def load(folder: Path) -> Lineage | None:
    """Read the lineage of a model's folder; None if it has none.

    Raises CheckpointError for a file that is damaged.
    """
    path = folder / NAME
    try:
        return Lineage.model_validate_json(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValidationError as error:
        raise CheckpointError(
            f"{path}: not a valid {NAME} ({describe_error(error, Lineage)[:200]}); restore it from "
            "a copy of this folder, or use another checkpoint"
        ) from None


def unite(lineages: Sequence[Lineage]) -> Lineage:
    """Return the lineage of a model made from all of these, with the first one's bottleneck."""
    first, *others = lineages
    backbones, history = list(first.backbones), list(first.history)
    for other in others:
        backbones += [b for b in other.backbones if all(b.differences(k) for k in backbones)]
        history += [training for training in other.history if training not in history]
    return first.model_copy(update={"backbones": tuple(backbones), "history": tuple(history)})


def identify(model: ModelConfig, recorded: Backbone | None = None) -> Backbone | None:
    """Identify the recipe's backbone by its current content.

    Each file is read once (`cached_sha256`). A name is looked up in the local cache of the Hugging
    Face Hub.

    Args:
        model: The `model` section of a recipe.
        recorded: The result of an earlier start. It is returned for an address that names its
            content (`wheel:`), and if the files no longer exist.

    Returns:
        None when the content is unknown without a download.

    """
    place = model.backbone
    if recorded is not None and place.startswith("wheel:"):
        return recorded
    found = _files_of(place, model.revision)
    if found is None:
        return recorded
    if found.is_file():  # one file that is all three
        parts = dict.fromkeys(("config", "tokenizer", "weights"), cached_sha256(found))
    else:
        parts = {
            "config": _config_hash(found),
            "tokenizer": tokenizer_hash(found),
            "weights": _weights_hash(found),
        }
    return Backbone(name=mask_secrets(place), num_layers=model.num_layers, **parts)


def _files_of(place: str, revision: str | None) -> Path | None:
    """Return the folder or the one file at `place`; None when it is not on this disk."""
    path = Path(place).expanduser()
    if path.exists():
        return path
    if place.startswith("wheel:"):
        try:
            return locate(place)
        except LbrError:
            return None
    if place.startswith((".", "/", "~")) or place.count("/") > 1:
        return None
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    options: Any = {"allow_patterns": _HUB_FILES, "local_files_only": True}
    try:
        return Path(snapshot_download(place, revision=revision, **options))
    except (LocalEntryNotFoundError, HFValidationError, OSError):
        return None


def _config_hash(folder: Path) -> str:
    """Hash of config.json's content without what only names its writer."""
    config = _json(folder / "config.json")
    return _digest({key: value for key, value in config.items() if key not in _WRITERS})


def tokenizer_hash(folder: Path) -> str:
    """Hash of what turns a text into ids: the vocabulary's files and the special tokens."""
    content = _json(folder / "tokenizer.json")
    for setting in ("truncation", "padding"):  # of the last call, and no part of the tokenizer
        content.pop(setting, None)
    files: dict[str, Any] = {"tokenizer.json": content}
    if not content:
        files = {n: cached_sha256(folder / n) for n in _VOCABULARIES if (folder / n).is_file()}
    settings = _json(folder / "tokenizer_config.json")
    special = {name: _text_of(settings.get(name)) for name in _SPECIAL}
    return _digest([files, special])


def _weights_hash(folder: Path) -> str:
    """Hash of the contents of the weights' files, whatever they are called."""
    return _digest(sorted(cached_sha256(path) for path in folder.glob("*.safetensors")))


def _text_of(token: Any) -> Any:
    """Return a special token's text, from a string or an object that holds it."""
    return token.get("content") if isinstance(token, dict) else token


def _json(path: Path) -> dict[str, Any]:
    """Return a JSON object's content; {} for a missing file or anything else."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _short(value: Any) -> str:
    """Return a hash as messages show it."""
    return value[:_SHOWN] if isinstance(value, str) else str(value)


def _same(one: Training, other: Training) -> bool:
    """Whether both are the same stage on the same data."""
    read = [(made.stage, fingerprint_of(made.data, made.stage)) for made in (one, other)]
    return read[0] == read[1]


def fingerprint_of(data: Manifest | Dataset, stage: int) -> str:
    """Return the fingerprint of what the stage reads: stage 1 does not read mined negatives."""
    return data.prepared if stage == 1 else data.fingerprint
