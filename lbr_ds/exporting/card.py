"""The model card of an export: README.md, with front matter that a hub reads.

`model_card` writes it at export; `add_scores` puts the results of an evaluation into it, both as a
`model-index` in the front matter (the form that MTEB and the hub use) and as a table.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from jinja2 import PackageLoader
from transformers import AutoConfig

import lbr_ds
from lbr_ds import config, lineage, runs
from lbr_ds.config import CardConfig, RunConfig
from lbr_ds.errors import ConfigError
from lbr_ds.evaluation.scores import read_scores
from lbr_ds.lineage import Lineage
from lbr_ds.model.bottleneck import Card
from lbr_ds.system.atomic import write_text
from lbr_ds.system.markdown import escape, template_environment
from lbr_ds.system.tables import markdown_table

NAME = "README.md"
_TAGS = [
    "sentence-transformers",
    "feature-extraction",
    "sentence-similarity",
    "retrieval",
    "text-embeddings-inference",
    "learn-before-represent",
]
_SCORES = re.compile(r"(<!-- scores: .*? -->\n).*?(<!-- end of scores -->)", re.DOTALL)
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_METRICS = {
    "ndcg_at_10": "nDCG@10",
    "recall_at_10": "Recall@10",
    "mrr_at_10": "MRR@10",
    "main_score": "main score",
}


def model_card(place: Path, folder: Path, card: Card, parity: dict[str, Any]) -> str:
    """Return README.md of an export: what it is, how to use it, recipe, data, scores.

    Args:
        place: What was exported: a run, a checkpoint, or a folder of weights.
        folder: The export, complete but for this file.
        card: How the model turns a text into a vector.
        parity: The content of parity.json.
    """
    run = runs.run_of(place)
    made = lineage.load(folder)
    facts: dict[str, Any] = {"recipe": None, "lineage": made, "compared": {}}
    wanted = CardConfig()
    if run is not None:
        facts["recipe"] = (run / "recipe.yaml").read_text(encoding="utf-8")
        wanted = _completed(config.load(run / "recipe.yaml"))
        for path in sorted((run / "eval").glob("*.json")):
            facts["compared"][path.stem] = read_scores(path)["tasks"]
    shape = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    templates = template_environment(PackageLoader("lbr_ds", "templates"))
    text = templates.get_template("model_card.md").render(
        config=shape, card=card, parity=parity, program=lbr_ds.__version__, wanted=wanted, **facts
    )
    return f"---\n{_front_matter(wanted, made)}\n---\n\n{text.strip()}\n"


def _completed(run: RunConfig) -> CardConfig:
    """Return the recipe's `card`, completed from its other keys."""
    wanted = run.card
    backbone = run.model.backbone
    if not wanted.base_model and _HUB_NAME.fullmatch(backbone) and not Path(backbone).exists():
        wanted = wanted.model_copy(update={"base_model": backbone})
    if not wanted.language:
        wanted = wanted.model_copy(update={"language": run.data.languages})
    return wanted


def _front_matter(wanted: CardConfig, made: Lineage | None) -> str:
    """YAML by huggingface_hub, which knows the keys and leaves out what is None."""
    places = [source.path for data in (made.datasets if made else ()) for source in data.sources]
    named = [place.removeprefix("hf:") for place in places if place.startswith("hf:")]
    datasets = list(dict.fromkeys(named))
    data = ModelCardData(
        base_model=wanted.base_model,
        license=wanted.license,
        language=list(wanted.language) or None,
        datasets=datasets or None,
        library_name="sentence-transformers",
        pipeline_tag="sentence-similarity",
        tags=_TAGS,
    )
    return str(data.to_yaml())


def add_scores(folder: Path, result: dict[str, Any]) -> None:
    """Write an evaluation's scores into the model card of an exported folder.

    A score of the same task, split and corpus replaces the former one. Does nothing for a folder
    whose README.md was not written by `lbr-ds export`.

    Args:
        folder: The folder that was evaluated.
        result: What `evaluate` returned.

    Raises:
        ConfigError: The front matter of README.md cannot be read.
    """
    path = folder / NAME
    if not path.is_file() or not _SCORES.search(path.read_text(encoding="utf-8")):
        return
    try:
        card = ModelCard.load(path, ignore_metadata_errors=True)
    except (ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"{path}: the front matter cannot be read ({reason})") from None
    scores = {_key(score): score for score in card.data.eval_results or []}
    for name, task in result["tasks"].items():
        own = name in result.get("per_query", {})  # held out by `prepare`, no task of MTEB's
        made = _eval_results(name, task, name if own else f"mteb/{name}")
        scores |= {_key(score): score for score in made}
    card.data.model_name = card.data.model_name or folder.resolve().name
    card.data.eval_results = [scores[key] for key in sorted(scores)]
    card.text = _SCORES.sub(lambda m: m[1] + _table(card.data.eval_results) + m[2], card.text)
    write_text(path, str(card))


def _key(score: EvalResult) -> tuple[str, ...]:
    return (score.dataset_name, score.dataset_split or "", score.metric_type)


def _eval_results(name: str, task: dict[str, Any], place: str) -> list[EvalResult]:
    """Return the metrics of one task, in percent as in MTEB's own cards."""
    metrics = [metric for metric in _METRICS if metric in task]
    kind = "Retrieval" if "ndcg_at_10" in task else str(task.get("metric", "other"))
    size = {k: task[k] for k in ("queries", "documents") if task.get(k) is not None}
    return [
        EvalResult(
            task_type=kind,
            dataset_type=place,
            dataset_name=name,
            dataset_config="default",
            dataset_split=task.get("split", "test"),
            dataset_args=size or None,
            metric_type=metric,
            metric_name=_METRICS[metric],
            metric_value=round(100 * task[metric], 3),
        )
        for metric in metrics
    ]


def _table(scores: list[EvalResult]) -> str:
    """Return a table with a row for each task; the numbers are those of the front matter."""
    rows: dict[str, dict[str, Any]] = {}
    for score in scores:
        row = rows.setdefault(score.dataset_name, dict(score.dataset_args or {}))
        row[score.metric_type] = score.metric_value
    shown = [metric for metric in _METRICS if any(metric in row for row in rows.values())]
    lines = []
    for name, row in rows.items():
        cells = [f"{row[metric]:.2f}" if metric in row else "" for metric in shown]
        counts = [str(row.get(count, "")) for count in ("queries", "documents")]
        lines.append([escape(name), *cells, *counts])
    head = ["task", *(_METRICS[metric] for metric in shown), "queries", "passages"]
    return markdown_table(head, lines) + "\n"
