"""A step reads from the device at most twice, whatever the number of micro-batches."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lbr_ds.config import load
from lbr_ds.corpora.prepare import prepare
from lbr_ds.model.bottleneck import prepare_backbone
from tests.ranks import run_ranks
from tests.tiny import tiny_recipe
from tests.training.reads import CASES, LAYOUTS, count

pytestmark = pytest.mark.slow
AT_MOST = 2


def test_reads_are_seen() -> None:
    x = torch.arange(6.0)
    acts = (x.sum().item, x.tolist, x.cpu, lambda: x[x > 2], lambda: bool(x[0] > 1), x.numpy)
    assert [len(count(act)) > 0 for act in acts] == [True] * len(acts)
    assert count(lambda: (x * 2).sum()) == []


def test_a_step_reads_twice_whatever_its_micro_batches(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, prepared=False)
    corpus = tmp_path / "corpus.jsonl"
    rows = [json.loads(line) for line in corpus.read_text().splitlines()]
    several = [{**row, "source": f"part {n % 3}"} for n, row in enumerate(rows)]
    corpus.write_text("".join(json.dumps(row) + "\n" for row in several))
    sources = f"[{{path: {corpus}, name: part 1, temperature: 0.1}}]"
    run = load(recipe, [f"data.sources={sources}"])
    prepare(run.data, run.seed)
    prepare_backbone(run.model, run.bottleneck, run.run / "backbone", run.seed)
    (run.run / "recipe.yaml").write_text(run.dump())
    run_ranks("tests.training.reads", 1, str(run.run / "recipe.yaml"), str(run.run))
    found = json.loads((run.run / "reads.json").read_text())
    assert len(found) == len(LAYOUTS) * len(CASES)
    for case, places in found.items():
        assert len(places) <= AT_MOST, (case, places)
