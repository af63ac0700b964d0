"""Clean records: tidy their texts and drop what is empty, too long or in another language.

These are pure functions of one record, so that any number of processes can share the work.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from hashlib import blake2b

from lbr_ds.config import DataConfig
from lbr_ds.corpora.curate.language import other_language
from lbr_ds.corpora.curate.segmentation import key, letters, visible, without_invisible
from lbr_ds.corpora.sources import Corpus
from lbr_ds.corpora.token_counts import count
from lbr_ds.records import Record


def clean(text: str) -> str:
    """Return a text in Unicode NFC, without invisible characters and surplus white space."""
    return " ".join(unicodedata.normalize("NFC", without_invisible(text)).split())


def clean_lines(text: str) -> str:
    """Return a text as `clean` does, but keep line ends and indentation."""
    plain = unicodedata.normalize("NFC", without_invisible(text))
    return "\n".join(line.rstrip() for line in plain.splitlines()).strip("\n")


@dataclass(frozen=True)
class Rules:
    """The rules for the records of one source."""

    min_chars: int
    max_chars: int
    min_tokens: int
    max_tokens: int | None
    tokenizer: str  # a file; empty without limits in tokens
    languages: tuple[str, ...]
    keep_lines: bool
    max_shared_letters: int | None

    @classmethod
    def of(cls, data: DataConfig, corpus: Corpus, tokenizer: str) -> Rules:
        """Return the recipe's rules for a source; the language of code is not checked."""
        return cls(
            data.min_chars,
            data.max_chars,
            data.min_tokens or 0,
            data.max_tokens,
            tokenizer,
            () if corpus.keep_lines else data.languages,
            corpus.keep_lines,
            corpus.source.max_shared_letters,
        )

    def fault(self, text: str) -> tuple[str, str] | None:
        """Return the rule that a text breaks, and how; the expensive rules come last."""
        if not visible(text):
            return "empty", "no visible character"
        if len(text) < self.min_chars:
            return "too_short", f"{len(text)} characters"
        if len(text) > self.max_chars:
            return "too_long", f"{len(text)} characters"
        if self.tokenizer:
            tokens = count(text, self.tokenizer)
            if tokens < self.min_tokens:
                return "too_few_tokens", f"{tokens} tokens"
            if self.max_tokens is not None and tokens > self.max_tokens:
                return "too_many_tokens", f"{tokens} tokens"
        other = other_language(text, self.languages) if self.languages else ""
        return ("other_language", other) if other else None


@dataclass(frozen=True)
class Cleaned:
    """A cleaned record with the keys of its texts, or why it is dropped; and the removed texts."""

    record: Record
    dropped: tuple[str, str] | None = None  # rule, example
    removed: list[tuple[str, str]] = field(default_factory=list)
    keys: dict[str, list[bytes]] = field(default_factory=dict)  # by field

    @property
    def identity(self) -> bytes:
        """Equal for exact duplicates: the same query with the same answers, or the same passage."""
        parts = [*self.keys["query"], *sorted(self.keys["positives"]), *self.keys["text"]]
        return blake2b(b"".join(parts), digest_size=16).digest()


def clean_record(record: Record, rules: Rules) -> Cleaned:
    """Apply every rule that concerns a single record."""
    tidy = clean_lines if rules.keep_lines else clean
    removed: list[tuple[str, str]] = []
    positives = _distinct(record, "positives", tidy, removed)
    for known, text in list(positives.items()):
        if len(positives) > 1 and not visible(text):
            removed.append(("positive_empty", f"{record.id}: {record.query[:200]}"))
            del positives[known]
    negatives = _distinct(record, "negatives", tidy, removed)
    for known, text in list(negatives.items()):
        if fault := rules.fault(text):
            removed.append((f"negative_{fault[0]}", f"{record.id}: {fault[1]}: {text[:200]}"))
            del negatives[known]
    query = tidy(record.query)
    only_answer_is_query = _remove_repeated(
        record, key(query) if query else b"", positives, negatives, removed
    )
    record = replace(
        record,
        positive_scores=_of_kept(record.positive_scores, record.positives, tidy, positives),
        negative_scores=_of_kept(record.negative_scores, record.negatives, tidy, negatives),
        query=query,
        positives=list(positives.values()),
        negatives=list(negatives.values()),
        text=tidy(record.text),
        group=record.group.strip(),
    )
    for text in [record.text] if record.text else [record.query, *record.positives]:
        if fault := rules.fault(text):
            example = f"{record.id}: {fault[1]}: {text[:200]}"
            return Cleaned(record, (fault[0], example), removed)
    if only_answer_is_query:
        return Cleaned(record, ("positive_is_query", f"{record.id}: {query[:200]}"), removed)
    longest = rules.max_shared_letters
    if longest is not None and record.query and shares_letters(record, longest):
        example = f"{record.id}: {record.query[:80]} / {record.positives[0][:80]}"
        return Cleaned(record, ("shares_letters", example), removed)
    keys = {
        "query": [key(record.query)] if record.query else [],
        "positives": list(positives),
        "negatives": list(negatives),
        "text": [key(record.text)] if record.text else [],
    }
    return Cleaned(record, None, removed, keys)


def _distinct(
    record: Record, name: str, tidy: Callable[[str], str], removed: list[tuple[str, str]]
) -> dict[bytes, str]:
    """Return the cleaned texts of a list by key, each normalised text once."""
    kept: dict[bytes, str] = {}
    for text in map(tidy, getattr(record, name)):
        if kept.setdefault(key(text), text) is not text:
            removed.append((f"repeated_in_{name}", f"{record.id}: {text[:200]}"))
    return kept


def _of_kept(
    scores: list[float], texts: list[str], tidy: Callable[[str], str], kept: dict[bytes, str]
) -> list[float]:
    """Return the scores of the texts that are kept; of equal texts the first one's."""
    if not scores:
        return []
    # The last entry of a key is the one that stays in a dictionary, so the first text comes last.
    pairs = reversed(list(zip(texts, scores, strict=True)))
    of = {key(tidy(text)): score for text, score in pairs}
    return [of[known] for known in kept]


def _remove_repeated(
    record: Record,
    query: bytes,
    positives: dict[bytes, str],
    negatives: dict[bytes, str],
    removed: list[tuple[str, str]],
) -> bool:
    """Remove answers that repeat the query, and negatives that repeat the query or an answer.

    Returns whether the only answer is the query.
    """
    for known, text in list(negatives.items()):
        if known == query or known in positives:
            rule = "negative_is_query" if known == query else "negative_is_a_positive"
            removed.append((rule, f"{record.id}: {text[:200]}"))
            del negatives[known]
    if query not in positives or len(positives) == 1:
        return query in positives
    removed.append(("positive_is_query", f"{record.id}: {positives.pop(query)[:200]}"))
    return False


def shares_letters(record: Record, longest: int) -> bool:
    """Return whether the query and an answer share a run of more than `longest` letters."""
    query = letters(record.query)
    runs = {query[i : i + longest + 1] for i in range(len(query) - longest)}
    return any(run in answer for answer in map(letters, record.positives) for run in runs)
