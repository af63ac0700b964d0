"""Records as read -> records as kept: tidy text, sizes within bounds; and what texts are compared
by. Pure functions of one record, so that any number of processes may share the work."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from hashlib import blake2b

from lbr_ds.config import DataConfig
from lbr_ds.corpora.language import other_language
from lbr_ds.corpora.sources import Corpus
from lbr_ds.corpora.tokens import count
from lbr_ds.records import Record


def clean(text: str) -> str:
    """The text that is kept: Unicode NFC, every run of white space one blank, ends trimmed."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def clean_lines(text: str) -> str:
    """The text that is kept where lines carry meaning: as `clean`, but line ends and indentation
    stay, without blanks at the ends of lines and empty lines at the ends of the text."""
    lines = [line.rstrip() for line in unicodedata.normalize("NFC", text).splitlines()]
    return "\n".join(lines).strip("\n")


def normalise(text: str) -> str:
    """The text as compared: equal for texts that differ in case, spacing or punctuation only.

    NFKC, case folded, invisible format characters removed, punctuation and white space one blank.
    Symbols stay ("Na+" is not "Na"). A text of punctuation alone is compared as it is.
    """
    folded = unicodedata.normalize("NFKC", text).casefold()
    if not folded.isascii():  # folding may leave what NFKC would join
        folded = unicodedata.normalize("NFKC", folded)
    return " ".join(folded.translate(_BLANKS).split()) or folded


class _Blanks(dict[int, "str | None"]):
    """Character -> what `normalise` makes of it; filled as characters turn up."""

    def __missing__(self, point: int) -> str | None:
        kind = unicodedata.category(chr(point))
        to: str | None = chr(point)
        if kind == "Cf":
            to = None
        elif kind[0] in "PZ" or kind == "Cc":
            to = " "
        self[point] = to
        return to


_BLANKS = _Blanks()


def key(text: str) -> bytes:
    """16 bytes that stand for `normalise(text)`."""
    return blake2b(normalise(text).encode(), digest_size=16).digest()


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
            data.min_chars, data.max_chars, data.min_tokens or 0, data.max_tokens, tokenizer,
            () if corpus.keep_lines else data.languages, corpus.keep_lines,
            corpus.source.max_shared_letters,
        )  # fmt: skip

    def fault(self, text: str) -> tuple[str, str] | None:
        """The rule that the text itself breaks, and by what; the costly rules come last."""
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
        return ("other_language", f"language {found}") if found else None


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
    negatives = _distinct(record, "negatives", tidy, removed)
    for known, text in list(negatives.items()):
        if fault := rules.fault(text):
            removed.append((f"negative_{fault[0]}", f"{record.id}: {fault[1]}: {text[:200]}"))
            del negatives[known]
    record = replace(
        record,
        query=tidy(record.query),
        positives=list(positives.values()),
        negatives=list(negatives.values()),
        text=tidy(record.text),
        group=record.group.strip(),
    )
    for text in [record.text] if record.text else [record.query, *record.positives]:
        if fault := rules.fault(text):
            example = f"{record.id}: {fault[1]}: {text[:200]}"
            return Cleaned(record, (fault[0], example), removed)
    letters = rules.max_shared_letters
    if letters is not None and record.query and shares_letters(record, letters):
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


def shares_letters(record: Record, longest: int) -> bool:
    """Whether query and an answer have a run of more than `longest` letters in common."""
    query = _letters(record.query)
    runs = {query[i : i + longest + 1] for i in range(len(query) - longest)}
    return any(run in answer for answer in map(_letters, record.positives) for run in runs)


def _letters(text: str) -> str:
    return "".join(filter(str.isalpha, text.casefold()))
