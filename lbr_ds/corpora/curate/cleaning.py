"""Records as read -> records as kept: tidy text, sizes within bounds. Pure functions of one record,
so that any number of processes may share the work."""

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
    """The text that is kept: Unicode NFC, without invisible characters, every run of white space
    one blank, ends trimmed."""
    return " ".join(unicodedata.normalize("NFC", without_invisible(text)).split())


def clean_lines(text: str) -> str:
    """The text that is kept where lines carry meaning: as `clean`, but line ends and indentation
    stay, without blanks at the ends of lines and empty lines at the ends of the text."""
    plain = unicodedata.normalize("NFC", without_invisible(text))
    return "\n".join(line.rstrip() for line in plain.splitlines()).strip("\n")


@dataclass(frozen=True)
class Rules:
    """What a record of one source must keep to."""

    min_chars: int
    max_chars: int
    min_tokens: int
    max_tokens: int | None
    tokenizer: str  # a file; empty where no bound in tokens is set
    languages: tuple[str, ...]
    keep_lines: bool
    max_shared_letters: int | None

    @classmethod
    def of(cls, data: DataConfig, corpus: Corpus, tokenizer: str) -> Rules:
        """The rules of the recipe for a source; code is in no language that could be told."""
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
        """The rule that the text itself breaks, and by what; the costly rules come last."""
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
        found = other_language(text, self.languages) if self.languages else ""
        return ("other_language", found) if found else None


@dataclass(frozen=True)
class Cleaned:
    """A record with the key of each of its texts, or why it goes; and which texts went."""

    record: Record
    dropped: tuple[str, str] | None = None  # rule, example
    removed: list[tuple[str, str]] = field(default_factory=list)
    keys: dict[str, list[bytes]] = field(default_factory=dict)  # by field

    @property
    def identity(self) -> bytes:
        """Equal for exact duplicates: the same question with the same answers, or passage."""
        parts = [*self.keys["query"], *sorted(self.keys["positives"]), *self.keys["text"]]
        return blake2b(b"".join(parts), digest_size=16).digest()


def clean_record(record: Record, rules: Rules) -> Cleaned:
    """Apply every rule that looks at one record only."""
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
    same = _without_twins(record, key(query) if query else b"", positives, negatives, removed)
    record = replace(
        record,
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
    if same:
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
    """The cleaned texts of a list, each normalised text once, by key."""
    kept: dict[bytes, str] = {}
    for text in map(tidy, getattr(record, name)):
        if kept.setdefault(key(text), text) is not text:
            removed.append((f"repeated_in_{name}", f"{record.id}: {text[:200]}"))
    return kept


def _without_twins(
    record: Record,
    query: bytes,
    positives: dict[bytes, str],
    negatives: dict[bytes, str],
    removed: list[tuple[str, str]],
) -> bool:
    """Take out answers that are the query once more, and negatives that are the query or an answer.

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
    """Whether query and an answer have a run of more than `longest` letters in common."""
    query = letters(record.query)
    runs = {query[i : i + longest + 1] for i in range(len(query) - longest)}
    return any(run in answer for answer in map(letters, record.positives) for run in runs)
