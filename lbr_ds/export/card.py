"""README.md of an exported folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader

import lbr_ds
from lbr_ds import runs
from lbr_ds.model.bottleneck import Card


def model_card(place: Path, folder: Path, card: Card, parity: dict[str, Any]) -> str:
    """README.md of the export: what it is, how to use it, recipe, data, scores."""
    run = runs.run_of(place)
    facts: dict[str, Any] = {"recipe": None, "curation": None, "scores": {}}
    if run is not None:
        facts["recipe"] = (run / "recipe.yaml").read_text(encoding="utf-8")
        curation = Path(yaml.safe_load(facts["recipe"])["data"]["folder"]) / "curation.json"
        if curation.is_file():
            facts["curation"] = json.loads(curation.read_text(encoding="utf-8"))
        for path in sorted((run / "eval").glob("*.json")):
            facts["scores"][path.stem] = json.loads(path.read_text(encoding="utf-8"))["tasks"]
    config = json.loads((folder / "config.json").read_text())
    environment = Environment(loader=PackageLoader("lbr_ds", "templates"), trim_blocks=True)
    return environment.get_template("model_card.md").render(
        config=config, card=card, parity=parity, program=lbr_ds.__version__, **facts
    )
