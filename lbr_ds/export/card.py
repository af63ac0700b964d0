"""README.md of an exported folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from jinja2 import PackageLoader
from transformers import AutoConfig

import lbr_ds
from lbr_ds import runs
from lbr_ds.errors import DataError
from lbr_ds.markdown import environment
from lbr_ds.model.bottleneck import Card
from lbr_ds.scores import read_scores
from lbr_ds.strict import read_json


def model_card(place: Path, folder: Path, card: Card, parity: dict[str, Any]) -> str:
    """README.md of the export: what it is, how to use it, recipe, data, scores."""
    run = runs.run_of(place)
    facts: dict[str, Any] = {"recipe": None, "curation": None, "scores": {}}
    if run is not None:
        facts["recipe"] = (run / "recipe.yaml").read_text(encoding="utf-8")
        curation = Path(yaml.safe_load(facts["recipe"])["data"]["folder"]) / "curation.json"
        if curation.is_file():
            facts["curation"] = read_json(
                curation, "prepare's account", DataError, "prepare the data again", strict=False
            )
        for path in sorted((run / "eval").glob("*.json")):
            facts["scores"][path.stem] = read_scores(path)["tasks"]
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    templates = environment(PackageLoader("lbr_ds", "templates"))
    return templates.get_template("model_card.md").render(
        config=config, card=card, parity=parity, program=lbr_ds.__version__, **facts
    )
