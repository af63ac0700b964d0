"""A prepared corpus of passages with real questions to evaluate on, and what to write for them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from lbr_ds.config import RunConfig
from tests.tiny import prepared_run

_WORDS = ("fever", "pain", "cough", "rash", "cramp", "nausea", "chills", "tremor")


def passage(number: int) -> str:
    """A passage that its number and its words tell from any other."""
    words = " ".join(_WORDS[(number * k) % 8] + str(number * k % 23) for k in range(1, 16))
    return f"Disease{number} comes with {words}."


def question(number: int) -> str:
    """A real question about a passage, long enough to have near duplicates."""
    words = " ".join(_WORDS[(number * k) % 7] + str(number * k % 19) for k in range(1, 11))
    return f"which of {words} do people with disease{number} report"


def make_run(folder: Path, *, passages: int = 60, asked: int = 20, **synthesis: Any) -> RunConfig:
    """Passages 0..n in documents of two; questions about `asked` others, which only evaluate."""
    folder.mkdir(parents=True, exist_ok=True)
    documents, questions = folder / "documents.jsonl", folder / "questions.jsonl"
    texts = [{"text": passage(i), "group": f"d{i // 2}"} for i in range(passages)]
    pairs = [
        {"id": f"q{i}", "query": question(i), "positives": [passage(i)]}
        for i in range(1000, 1000 + asked)
    ]
    for path, rows in ((documents, texts), (questions, pairs)):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    sources = [
        {"path": str(documents), "name": "documents", "instruction": "Find: "},
        {"path": str(questions), "name": "questions", "role": "eval"},
    ]
    splits = {"gl": 20, "cl": passages - 20, "eval": asked}
    settings = {"retries": 3, "keep_rank": 3, **synthesis}
    return prepared_run(folder, sources, splits, synthesis=settings)


def with_synthesis(run: RunConfig, **synthesis: Any) -> RunConfig:
    """The same run with other settings of `synthesis`."""
    changed = {**run.synthesis.model_dump(), **synthesis}
    return run.model_copy(update={"synthesis": type(run.synthesis).model_validate(changed)})


def number_of(text: str) -> int:
    """The number of the passage that a prompt or passage is about."""
    found = re.search(r"Disease(\d+)", text)
    assert found, text
    return int(found[1])


def good_queries(text: str, request: dict[str, Any]) -> str:
    """Two numbered queries that only this passage answers; a greeting if there is no passage."""
    if not text:
        return "Hello!"
    number = number_of(text)
    return f"1. what is disease{number}?\n2. Who gets Disease{number} with {text.split()[3]}"
