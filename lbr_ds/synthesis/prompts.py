"""What a language model is asked, and the queries in its answer."""

from __future__ import annotations

import json
import re

from lbr_ds.config.synthesis import SynthesisConfig

Message = dict[str, str]  # "role" and "content", as chat models have it
_THOUGHT = re.compile(r"<think>.*?(</think>|$)", re.S)
_FENCE = re.compile(r"^```\w*$", re.M)
# "1. ", "2) ", "- ", "Query 3: ", "Q1: " and combinations of them before a query, also in the forms
# of Chinese and Japanese; \d is a digit of any script. "0.9% saline" and "q.i.d." are no prefixes.
_BEFORE = re.compile(
    r"^\s*(?:[-*\u2022]\s+|[\u25cf\u30fb\u2460-\u2473]\s*"
    r"|[(\uff08\u3010]?\d{1,3}[.):\u3001\u3011\uff09\uff0e\uff1a](?!\d)\s*"
    r"|\**(?:query|question|q)\s*\d{0,3}\**\s*(?:[:\uff1a]|\.(?!\d|[a-z]\b))\**\s*)+",
    re.I,
)
_QUOTES = {'"': '"', "'": "'", "\u201c": "\u201d", "\u300c": "\u300d", "*": "*", "`": "`"}


def messages(settings: SynthesisConfig, passage: str) -> list[Message]:
    """Return the chat that asks for queries: each example as a question and its answer, first."""
    chat = []
    for example in settings.examples:
        queries = "\n".join(example.queries)
        chat.append({"role": "user", "content": _prompt(settings, example.passage)})
        chat.append({"role": "assistant", "content": queries})
    chat.append({"role": "user", "content": _prompt(settings, passage)})
    return chat


def _prompt(settings: SynthesisConfig, passage: str) -> str:
    """Return the prompt; what is in the passage is not replaced."""
    parts = {
        "passage": passage[: settings.passage_chars],
        "count": str(settings.queries),
        "domain": settings.domain,
    }
    text = re.sub(r"\{(passage|count|domain)\}", lambda found: parts[found[1]], settings.prompt)
    return text.strip()


def parse(answer: str) -> list[str]:
    """Return the queries of an answer: its lines without numbers, bullets and quotation marks.

    Thoughts of reasoning models and lines that only announce the list are left out. An answer that
    is a JSON list of strings is read as one.
    """
    text = _FENCE.sub("", _THOUGHT.sub("", answer)).strip()
    found = _json_list(text)
    lines = text.splitlines() if found is None else found
    queries = (_bare(encodable(line)) for line in lines)
    return [query for query in queries if query and not query.endswith((":", "\uff1a"))]


def encodable(text: str) -> str:
    """Return a text with U+FFFD for each half of a surrogate pair, which UTF-8 cannot represent.

    JSON can hold such halves: a model that is stopped within an emoji writes one.
    """
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _json_list(text: str) -> list[str] | None:
    if not text.startswith("["):
        return None
    try:
        found = json.loads(text)
    except ValueError:
        return None
    return found if isinstance(found, list) and all(isinstance(q, str) for q in found) else None


def _bare(line: str) -> str:
    line = _BEFORE.sub("", line).strip().rstrip(",") if line.strip() else ""
    while len(line) > 1 and _QUOTES.get(line[0]) == line[-1]:
        line = line[1:-1].strip()
    return line
