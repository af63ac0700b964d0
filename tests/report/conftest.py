"""A made-up run folder with everything in it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import seal

RECIPE = """
name: made-up
run: {run}
model: {{backbone: some/backbone}}
data: {{folder: {data}}}
stage1: {{num_steps: 90, samples_per_step: 8, optim: {{lr: 1.0e-3}}}}
stage2: {{num_steps: 30, samples_per_step: 8, optim: {{lr: 1.0e-3}}}}
"""
SCORES = {"base": 0.1, "stage1": 0.3, "stage2": 0.55}
CURATION = {
    "sources": [{"name": "made up", "license": "none", "records_read": 130, "records_kept": 123}],
    "dropped_records": {"too_short": {"count": 7, "examples": []}},
    "splits": {"gl": {"records": 61, "components": 40}, "eval": {"records": 12}},
    "leaks": {"eval_gl": 0},
}


def metrics(steps: int, stage: int) -> list[dict[str, Any]]:
    """Rows as the training loop logs them; one loss is not a number."""
    rows = []
    for step in range(1, steps + 1):
        row: dict[str, Any] = {
            "step": step,
            "samples": 8 * step,
            "epoch": step / 10,
            "loss": math.nan if step == 7 else 3.0 / step,
            "grad_norm": math.inf if step == 7 else 1.0 + 1 / step,
            "lr": 1e-3 * step / steps,
            "tokens_per_second": 1000.0 + step,
            "samples_per_second": 10.0,
            "memory_gib": 1.5,
            "step_seconds": 2.0,
            "data_wait_seconds": 0.1,
        }
        if stage == 2:
            row |= {"accuracy": 0.5, "positive_cosine": 0.8, "negative_cosine": 0.1}
        rows.append(row)
    return rows


def evaluation(ndcg: float) -> dict[str, Any]:
    """What evaluate() writes, with two examples."""
    per_query = {f"q{n}": ndcg + (0.01 * (n % 3)) for n in range(12)}
    examples = [
        {
            "id": f"q{n}",
            "query": f"what is <thing> {n} & co?",
            "answers": [f"the | answer {n}"],
            "first_right": 2 if n else None,
            "passages": [
                {"text": "wrong", "score": 0.9, "right": False},
                {"text": f"the | answer {n}", "score": 0.8, "right": n > 0},
            ],
        }
        for n in range(2)
    ]
    scores = {"recall_at_10": ndcg + 0.1, "ndcg_at_10": ndcg, "mrr_at_10": ndcg}
    return {
        "model": "m",
        "tasks": {"made-up-eval": {**scores, "queries": 12, "documents": 34}},
        "per_query": {"made-up-eval": per_query},
        "examples": examples,
    }


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """RUN with recipe, both stages, three evaluations and an environment; DATA beside it."""
    folder, data = tmp_path / "run", tmp_path / "data"
    (folder / "eval").mkdir(parents=True)
    data.mkdir()
    (folder / "recipe.yaml").write_text(RECIPE.format(run=folder, data=data))
    (data / "curation.json").write_text(json.dumps(CURATION))
    for stage, steps in ((1, 90), (2, 30)):
        path = folder / f"stage{stage}" / "metrics.jsonl"
        path.parent.mkdir()
        saved = path.parent / "checkpoints" / f"step-{steps:06d}"
        saved.mkdir(parents=True)
        seal(saved, {"world_size": 2, "zero_stage": 3})
        path.write_text("".join(json.dumps(row) + "\n" for row in metrics(steps, stage)))
    judged = {
        "recall_at_10": 0.3,
        "ndcg_at_10": 0.2,
        "separation_ratio": 1.2,
        "alignment": 0.9,
        "uniformity": -1.5,
        "effective_rank": None,
        "loss": 3.0,
        "loss_without_bottleneck": 3.5,
        "queries": 9,
        "passages": 30,
    }
    lines = [json.dumps({"step": step, **judged}) for step in (45, 90)]
    (folder / "stage1" / "evaluations.jsonl").write_text("\n".join(lines))
    starts = [(0, "elsewhere"), (0, "stage1/checkpoints/step-000045"), (10, "stage2")]
    text = "".join(json.dumps({"step": n, "from": str(folder / p)}) + "\n" for n, p in starts)
    (folder / "stage2" / "starts.jsonl").write_text(text + '{"step": 1')
    for name, ndcg in SCORES.items():
        scored = {"checkpoint": "step-000020"} if name == "stage2" else {}  # the best one
        text = json.dumps(evaluation(ndcg) | scored)
        (folder / "eval" / f"{name}.json").write_text(text)
    environment = {"python": "3.11", "versions": {"torch": "2.13"}}
    (folder / "environment.json").write_text(json.dumps(environment))
    return folder
