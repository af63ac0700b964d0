"""Shares of the encoding on real ranks: `python -m tests.evaluation.share MODEL FOLDER OUT`.

MODEL: a run; FOLDER: a sentence-transformers model. Each rank leaves OUT/RANK.npz.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from mteb.types import PromptType
from torch.utils.data import DataLoader

from lbr_ds.distributed import ALONE, World, end, join, leave
from lbr_ds.evaluation import load_model, official_tasks
from lbr_ds.evaluation.across_ranks import encode_across_ranks
from tests.tiny import records

TEXTS = [f"question {n} " * (1 + n % 5) for n in range(7)]
TEXTS += [r["query"] for r in records(20)]


def vectors(model: str, world: World) -> np.ndarray:
    """What mteb would get of TEXTS; an odd number of them."""
    inputs: Any = DataLoader(Dataset.from_dict({"text": TEXTS}), batch_size=4)
    encoder: Any = load_model(model, world=world)
    return np.asarray(
        encoder.encode(
            inputs,
            task_metadata=official_tasks(["NFCorpus"])[0].metadata,
            hf_split="test",
            hf_subset="default",
            prompt_type=PromptType.query,
            show_progress_bar=False,
        )
    )


def lengths(seen: list[list[str]]) -> Any:
    """An encoder that notes what it was asked for."""

    def encode(texts: list[str]) -> np.ndarray:
        seen.append(texts)
        return np.array([[len(t), ord(t[0])] for t in texts], np.float32).reshape(-1, 2)

    return encode


if __name__ == "__main__":
    own, stock, out = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    world = join(timeout_minutes=2)
    assert world.size > 1
    for count in (0, 1, 2, 3, 8):
        texts, seen = ["abcdefgh"[n] * (1 + n % 4) for n in range(count)], list[list[str]]()
        expected = lengths([])(texts)
        assert (encode_across_ranks(world, texts, lengths(seen)) == expected).all(), count
        assert len(seen[0]) == -(-count // world.size)
    np.savez(
        out / f"{world.rank}.npz",
        own=vectors(own, world),
        stock=vectors(stock, world),
        own_alone=vectors(own, ALONE),
        stock_alone=vectors(stock, ALONE),
    )
    leave()
    end(0)
