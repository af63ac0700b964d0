"""Merge models of one backbone: the mean of their weights, or a point on the arc between two.

    merge([Path("runs/medical"), Path("runs/medical/backbone")], Path("models/both"), weight=0.7)

Fine-tuning for a domain costs general ability; a model between the two keeps part of both (model
soups, Wortsman et al. 2022, arXiv 2203.05482). Averaging the last checkpoints of one run usually
helps too (`last_checkpoints`). Tensors are read one at a time, so no model is in memory as a whole.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lbr_ds import lineage, runs
from lbr_ds.corpora.curate import trained_texts
from lbr_ds.encoder import folder_hash
from lbr_ds.errors import CheckpointError, ConfigError
from lbr_ds.instructions import NAME as INSTRUCTIONS
from lbr_ds.instructions import Instructions
from lbr_ds.model import made_from
from lbr_ds.model.bottleneck import Card
from lbr_ds.model.complete import fit
from lbr_ds.model.files import Stored, in_files, save_files, save_index
from lbr_ds.system.atomic import atomic_folder, try_recover, write_json
from lbr_ds.system.yaml_json import read_json

log = logging.getLogger(__name__)
Method = Literal["linear", "slerp"]
_MADE_HERE = ("*.safetensors", "*.index.json", lineage.NAME, trained_texts.NAME, INSTRUCTIONS)
_OF_EXPORTS = ("parity.json", "check_export.py", "README.md", "onnx", made_from.NAME)
# Keys of config.json that do not change what the weights mean.
_IRRELEVANT = ("_name_or_path", "transformers_version", "architectures", "dtype", "use_cache")
_PARALLEL = 1e-4  # radians below which the arc is a line


def merge(
    models: Sequence[Path], out: Path, *, weight: float | None = None, method: Method = "linear"
) -> list[Path]:
    """Write a model folder whose weights lie between those of several models.

    Args:
        models: Runs, stages, checkpoints, exports or model folders of one backbone, at least two.
        out: A new folder, which `export`, `eval` and `stage2.from` read. A folder that this merge
            has made before is kept as it is.
        weight: Share of the first model, 0 to 1; the others share the rest alike. None: all alike.
        method: linear: the weighted mean. slerp: of two models, each tensor is turned from one to
            the other along the arc, and its length is the weighted mean of both lengths.

    Returns:
        The folders of the weights that were merged.

    Raises:
        ConfigError: The models do not fit together, an argument is impossible, or `out` exists and
            holds anything else.
        CheckpointError: A model is damaged, also an earlier result in `out`.
    """
    shares = _shares(len(models), weight, method)
    folders = [runs.model_folder(model) for model in models]
    record = {"models": [folder_hash(f) for f in folders], "shares": shares, "method": method}
    if _is_made(out, record):
        try_recover(out)
        return folders
    _check_alike(folders)
    stored = [Stored(folder) for folder in folders]
    first = stored[0]
    _match_names(stored)
    with atomic_folder(out) as part:
        shutil.copytree(
            folders[0],
            part,
            dirs_exist_ok=True,
            ignore=shutil.ignore_patterns(*_MADE_HERE, *_OF_EXPORTS, runs.MANIFEST),
        )
        dtype = {name: first.dtype(name) for name in first.names()}
        sizes = {name: first.shape(name).numel() * dtype[name].itemsize for name in dtype}

        def read(name: str) -> Tensor:
            if method == "slerp":
                merged = _arc(stored[0].read(name), stored[1].read(name), shares[1])
            else:
                merged = _mean((one.read(name) for one in stored), shares)
            return merged.to(dtype[name])

        files = in_files(sizes)
        save_files(files, read, part)
        save_index(files, part)
        _describe(folders, part)
        write_json(part / made_from.NAME, record)
        runs.seal_folder(part)
    return folders


def _is_made(out: Path, record: dict[str, Any]) -> bool:
    """Return whether `out` is an undamaged result of the same merge."""
    path = out / made_from.NAME
    if not path.is_file():
        return False
    if read_json(path, "the record of a merge", CheckpointError, f"remove {out}") != record:
        raise ConfigError(
            f"{out} exists and was not merged from these models with this weight and method; "
            "give a new folder"
        )
    if why := runs.changed(out):
        raise CheckpointError(f"{out}: is damaged ({why}); remove it, and repeat the command")
    return True


def last_checkpoints(place: Path, count: int) -> list[Path]:
    """Return the newest `count` whole checkpoints of a run (of its last stage) or a stage.

    Raises:
        CheckpointError: There are fewer.
    """
    stages = [place / "stage2", place / "stage1", place]
    found = next((whole for stage in stages if (whole := runs.checkpoints(stage))), [])
    if len(found) < count:
        raise CheckpointError(
            f"{place}: has {len(found)} whole checkpoints, {count} are wanted; keep more with "
            "every.keep, or merge fewer"
        )
    return found[-count:]


def _shares(count: int, weight: float | None, method: str) -> list[float]:
    """Return the share of each model. Raises ConfigError for arguments that are impossible."""
    if count < 2:
        raise ConfigError(f"merging takes at least two models, {count} given")
    if method not in get_args(Method):
        raise ConfigError(f"method {method!r}: choose one of {', '.join(get_args(Method))}")
    if method == "slerp" and count != 2:
        raise ConfigError(f"method slerp takes two models, {count} given; use linear")
    weight = 1 / count if weight is None else weight
    if not 0 <= weight <= 1:
        raise ConfigError(f"weight {weight}: give the first model's share, from 0 to 1")
    return [weight, *[(1 - weight) / (count - 1)] * (count - 1)]


def _check_alike(folders: Sequence[Path]) -> None:
    """Raise ConfigError, naming the first difference, if the models do not fit together."""
    facts = [_facts(folder) for folder in folders]
    for folder, found in zip(folders[1:], facts[1:], strict=True):
        for name in facts[0].keys() | found.keys():
            one, other = facts[0].get(name), found.get(name)
            if one != other:
                raise ConfigError(
                    f"{folders[0]} and {folder} cannot be merged: {name} is {one!r} and {other!r}; "
                    "merge models that were trained from one backbone with one bottleneck"
                )


def _facts(folder: Path) -> dict[str, Any]:
    """Return what must be equal: shape of the network, tokenizer, and how a text is read."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    card = asdict(Card.load(folder))
    facts = {
        f"{key} of config.json": value for key, value in config.items() if key not in _IRRELEVANT
    }
    # An export without the head says that it is tied, and a truncated vector is the same model.
    for key in ("tie_word_embeddings", "matryoshka_dimensions"):
        facts.pop(f"{key} of config.json", None)
    card.pop("head")
    facts |= {f"{key} of lbr.json": value for key, value in card.items()}
    return {**facts, "the tokenizer": lineage.tokenizer_hash(folder)[:8]}


def _match_names(stored: Sequence[Stored]) -> None:
    """Let every model be read by the names of the first one.

    Raises:
        ConfigError: A tensor is missing or has another shape.
    """
    first = stored[0]
    for other in stored[1:]:
        found = fit(first.names(), other.names())
        other.rename(found.stored)
        if found.missing or found.unexpected:
            raise ConfigError(
                f"{first.folder} and {other.folder} cannot be merged: only one of them has tensor "
                f"{(found.missing or found.unexpected)[0]}; give both as checkpoints, or both as "
                "exports"
            )
        for name in first.names():
            if first.shape(name) != other.shape(name):
                raise ConfigError(
                    f"{first.folder} and {other.folder} cannot be merged: tensor {name} has the "
                    f"shapes {list(first.shape(name))} and {list(other.shape(name))}"
                )


def _mean(tensors: Any, shares: Sequence[float]) -> Tensor:
    """Return the weighted mean in fp32."""
    total: Tensor | None = None
    for tensor, share in zip(tensors, shares, strict=True):
        part = tensor.float() * share
        total = part if total is None else total.add_(part)
    assert total is not None
    return total


def _arc(one: Tensor, other: Tensor, share: float) -> Tensor:
    """Return the tensor at `share` of the way from `one` to `other`, in fp32.

    Shoemake 1985, on the tensor as one vector; the length is the weighted mean of both lengths.
    """
    a, b = one.float(), other.float()
    lengths = a.norm(), b.norm()
    if min(lengths) == 0:
        return _mean((one, other), (1 - share, share))
    a, b = a / lengths[0], b / lengths[1]
    # Exact for small angles too, unlike the arc cosine of the product.
    angle = 2 * torch.atan2((a - b).norm(), (a + b).norm())
    length = (1 - share) * lengths[0] + share * lengths[1]
    if angle < _PARALLEL:
        return length * ((1 - share) * a + share * b)
    turned = torch.sin((1 - share) * angle) * a + torch.sin(share * angle) * b
    return length * turned / torch.sin(angle)


def _describe(folders: Sequence[Path], part: Path) -> None:
    """Write what the merged model was trained on and with which instructions."""
    known = [found for folder in folders if (found := lineage.load(folder))]
    if known:
        lineage.unite(known).save(part)
    texts = [block for folder in folders for block in trained_texts.load(folder)]
    if texts:
        trained_texts.save(texts, part)
    used = [own for folder in folders if (own := Instructions.load(folder)).any]
    if used:
        used[0].save(part)
        if any(other != used[0] for other in used[1:]):
            log.warning(
                "the models were trained with different instructions; those of the first that has "
                "any are kept"
            )
