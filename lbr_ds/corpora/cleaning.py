"""Records as read -> records as kept: tidy text, sizes within bounds, no exact duplicates."""

from __future__ import annotations

import unicodedata
from dataclasses import replace
from hashlib import blake2b

from lbr_ds.config import DataConfig
from lbr_ds.corpora.reading import Tally
from lbr_ds.records import Record


def clean(text: str) -> str:
    """The text that is kept: Unicode NFC, every run of white space one blank, ends trimmed."""
    return " ".join(unicodedata.normalize("NFC", text).split())


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
    """16 bytes that stand for `normalise(text)`: sets of them stay small on large corpora."""
    return blake2b(normalise(text).encode(), digest_size=16).digest()


class Cleaner:
    """Cleans records one by one and remembers which it has seen."""

    def __init__(self, data: DataConfig) -> None:
        self.smallest, self.largest = data.min_chars, data.max_chars
        self.records = Tally()  # records dropped
        self.texts = Tally()  # texts taken out of records that stay
        self._seen: set[tuple[bytes, ...]] = set()

    def clean(self, record: Record) -> Record | None:
        """The record as kept, or None when a rule drops it."""
        record = replace(
            record,
            query=clean(record.query),
            positives=self._distinct(record, "positives"),
            negatives=[n for n in self._distinct(record, "negatives") if self._fits(record.id, n)],
            text=clean(record.text),
            group=record.group.strip(),
        )
        for text in [record.text] if record.text else [record.query, *record.positives]:
            rule = self._fault(text)
            if rule:
                self.records.add(rule, f"{record.id}: {len(text)} characters: {text}")
                return None
        parts = (key(record.text),) if record.text else _pair(record)
        if parts in self._seen:
            self.records.add("duplicate", f"{record.id}: {record.query or record.text}")
            return None
        self._seen.add(parts)
        return record

    def _fault(self, text: str) -> str:
        if len(text) < self.smallest:
            return "too_short"
        return "too_long" if len(text) > self.largest else ""

    def _fits(self, where: str, negative: str) -> bool:
        rule = self._fault(negative)
        if rule:
            self.texts.add(f"negative_{rule}", f"{where}: {negative}")
        return not rule

    def _distinct(self, record: Record, field: str) -> list[str]:
        """The cleaned texts of a list, each normalised text once."""
        kept: dict[bytes, str] = {}
        for text in map(clean, getattr(record, field)):
            if kept.setdefault(key(text), text) is not text:
                self.texts.add(f"repeated_in_{field}", f"{record.id}: {text}")
        return list(kept.values())


def _pair(record: Record) -> tuple[bytes, ...]:
    return (key(record.query), *sorted(map(key, record.positives)))
