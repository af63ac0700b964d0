"""Short names for the baselines of the paper's Table 1.

`bm25` runs everywhere; the others are fetched from the hub. Any other name that mteb or
sentence-transformers loads may be given as it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lbr_ds.errors import ConfigError


@dataclass(frozen=True)
class Baseline:
    """A baseline: its name in mteb's registry or on the hub ("" for none), and what it is."""

    model: str
    about: str


BM25 = "mteb/baseline-bm25s"  # with words of ours where mteb has none (`bm25.py`)
BASELINES = {
    "bm25": Baseline(BM25, "words alone, stemmed; needs no network"),
    "bge": Baseline("BAAI/bge-m3", "XLM-R large, bidirectional"),
    "gte": Baseline("Alibaba-NLP/gte-Qwen2-1.5B-instruct", "Qwen2-1.5B, bidirectional"),
    "llm2vec": Baseline(
        "McGill-NLP/LLM2Vec-Sheared-LLaMA-mntp-supervised", "Sheared-LLaMA-1.3B, bidirectional"
    ),
    # Causal LMs without an embedding head: sentence-transformers takes the mean of their states.
    "chemllm": Baseline("AI4Chem/CHEMLLM-2b-1_5", "InternLM2-1.8B on chemistry; runs own code"),
    "huatuo": Baseline("", "published as LoRA weights alone; merge them into LLaMA-7B"),
}


def resolve(name: str) -> str:
    """Return the model behind a short name; any other name unchanged.

    Raises ConfigError for a baseline that has no loadable model under any name.
    """
    if name not in BASELINES:
        return name
    if not BASELINES[name].model:
        raise ConfigError(f"{name}: {BASELINES[name].about}, and give that folder")
    return BASELINES[name].model


def check_ranks(model: str, ranks: int) -> None:
    """Raise ConfigError when several ranks cannot share the encoding by `model`, as for names."""
    if ranks > 1 and not Path(model).is_dir():
        raise ConfigError(
            f"{model}: {ranks} ranks cannot share its work, only that of a folder, a run or a "
            "checkpoint; start one process (--nproc 1)"
        )
