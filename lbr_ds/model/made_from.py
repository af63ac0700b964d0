"""Record what a prepared backbone was made from: the recipe's settings, and the files' content."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from lbr_ds import lineage, runs
from lbr_ds.config import BottleneckConfig, ModelConfig
from lbr_ds.corpora.curate import trained_texts
from lbr_ds.errors import CheckpointError
from lbr_ds.system.yaml_json import read_json

log = logging.getLogger(__name__)
NAME = "made_from.json"


def is_up_to_date(folder: Path, model: ModelConfig, wanted: dict[str, Any]) -> bool:
    """Return whether `folder` was prepared from the current backbone with the same settings."""
    if not (folder / NAME).is_file():
        return False
    if fault := runs.changed(folder):
        log.warning("%s is damaged and prepared again: %s", folder, fault)
        return False
    if (known := lineage.load(folder)) is None:
        return False
    found = read_json(
        folder / NAME, "the record of the backbone", CheckpointError, f"remove {folder}"
    )
    recorded = known.backbone
    if recorded is None:  # it could not be identified
        return bool(found == wanted)
    now = lineage.identify(model, recorded if found.get("backbone") == model.backbone else None)
    if now is None:
        return False
    place = {"backbone": model.backbone, "revision": model.revision}
    if changed := recorded.differences(now):
        log.info(
            "%s: model.backbone=%s has changed since (%s); it is prepared anew",
            folder,
            model.backbone,
            ", ".join(changed),
        )
    return not changed and {**found, **place} == wanted  # equal content may be at another place


def save_lineage(model: ModelConfig, bottleneck: BottleneckConfig, folder: Path) -> None:
    """Write the lineage of the prepared backbone into its folder."""
    now = lineage.identify(model)
    source = Path(model.backbone).expanduser()
    before = lineage.load(source) if source.is_dir() else None
    if before is not None:
        trained_texts.save(trained_texts.load(source), folder)
    lineage.Lineage(
        backbones=(*(before.backbones if before else ()), *((now,) if now else ())),
        bottleneck=lineage.Bottleneck.of(model, bottleneck),
        history=before.history if before else (),
    ).save(folder)
