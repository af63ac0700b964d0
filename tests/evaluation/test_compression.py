"""Truncated and quantised vectors: each precision against its rule written out in plain numpy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lbr_ds.errors import ConfigError
from lbr_ds.evaluation import EvalOptions, evaluate
from lbr_ds.evaluation.compression import score_compressed
from lbr_ds.evaluation.judgements import Judgements
from lbr_ds.evaluation.retrieval_metrics import rank_scores

WIDTH = 24


@pytest.fixture(scope="module")
def judged() -> Judgements:
    """30 queries, each with one or two of 300 documents."""
    relevant = {
        f"q{n}": {f"d{7 * n}": 1, **({f"d{7 * n + 3}": 1} if n % 3 else {})} for n in range(30)
    }
    return Judgements(
        {name: name for name in relevant}, {f"d{n}": f"d{n}" for n in range(300)}, relevant
    )


@pytest.fixture(scope="module")
def vectors(judged: Judgements) -> tuple[np.ndarray, np.ndarray]:
    """Documents at random; a query is near its own, and nearer in its first components."""
    rng = np.random.default_rng(0)
    documents = rng.normal(size=(300, WIDTH)).astype(np.float32)
    noise = np.linspace(0.8, 2.5, WIDTH) * rng.normal(size=(30, WIDTH))
    own = [next(iter(judged.relevant[name])) for name in judged.queries]
    queries = documents[[int(name[1:]) for name in own]] + noise.astype(np.float32)
    return queries, documents


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def by_hand(scores: np.ndarray, judged: Judgements) -> tuple[float, float]:
    """Recall@10 and nDCG@10 of whole rankings; ties to the greater id."""
    recalls, gains = [], []
    ids = list(judged.documents)
    for row, name in zip(scores, judged.queries, strict=True):
        right = judged.relevant[name]
        order = sorted(range(len(ids)), key=lambda i: (row[i], ids[i]), reverse=True)[:10]
        hits = [ids[i] in right for i in order]
        recalls.append(sum(hits) / len(right))
        best = sum(1 / np.log2(rank + 2) for rank in range(len(right)))
        gains.append(sum(hit / np.log2(rank + 2) for rank, hit in enumerate(hits)) / best)
    return float(np.mean(recalls)), float(np.mean(gains))


@pytest.mark.parametrize("size", [WIDTH, 12, 9])
def test_each_precision_is_its_rule(
    judged: Judgements, vectors: tuple[np.ndarray, np.ndarray], size: int
) -> None:
    rows = score_compressed(*vectors, judged, [12, 9], quantized=True)
    found = {r["precision"]: r for r in rows if r["dimensions"] == size}
    q, p = (unit(x[:, :size]) for x in vectors)
    low, high = p.min(0), p.max(0)
    bucket = np.clip(np.floor((p - low) / ((high - low) / 255)), 0, 255)
    middles = low + (bucket + 0.5) * (high - low) / 255
    signs, own = np.where(p > 0, 1.0, -1.0), np.where(q > 0, 1.0, -1.0)
    rough = own @ signs.T
    floor = np.sort(rough, axis=1)[:, -40][:, None]
    wanted = {
        "float32": (4 * size, q @ p.T),
        "int8": (size, q @ middles.T),
        "binary": ((size + 7) // 8, rough),
        "binary, rescored": ((size + 7) // 8, np.where(rough >= floor, q @ signs.T, -99.0)),
    }
    assert found.keys() == wanted.keys()
    for precision, (width, scores) in wanted.items():
        row = found[precision]
        recall, gain = by_hand(scores, judged)
        assert row["bytes"] == width
        assert row["recall_at_10"] == pytest.approx(recall, abs=1e-5), precision
        assert row["ndcg_at_10"] == pytest.approx(gain, abs=1e-5), precision
    assert found["int8"]["ndcg_at_10"] > found["binary"]["ndcg_at_10"]


def test_the_whole_in_fp32_is_the_evaluation(
    judged: Judgements, vectors: tuple[np.ndarray, np.ndarray]
) -> None:
    whole, *others = score_compressed(*vectors, judged, [9, 12], quantized=False)
    scores = {k: round(v, 5) for k, v in rank_scores(*vectors, judged).items()}
    assert whole == {"dimensions": WIDTH, "precision": "float32", "bytes": 96, **scores}
    assert [row["dimensions"] for row in others] == [12, 9]


def test_eval_scores_what_is_asked_for(sentence_folder: Path, data: Path) -> None:
    def rows(**options: Any) -> Any:
        result = evaluate(str(sentence_folder), data=data, options=EvalOptions(**options))
        return result["tasks"]["corpus-eval"].get("compressed")

    assert rows() is None
    found = rows(dimensions=(8,), quantized=True)
    assert [row["precision"] for row in found[:4]] == [row["precision"] for row in found[4:]]
    assert [row["dimensions"] for row in found[4:]] == [8] * 4
    with pytest.raises(ConfigError, match=r"dimensions: 4096 is not shorter than .*; give smaller"):
        rows(dimensions=(4096,))
    with pytest.raises(ConfigError, match=r"--quantized score .* give --data"):
        evaluate(str(sentence_folder), tasks=["NFCorpus"], options=EvalOptions(quantized=True))
