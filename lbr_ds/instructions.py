"""Instructions: the text that a model reads before a query or a document.

This module is the one place that puts an instruction and a text together (`Instructed`), that says
how much room an instruction may take (`check_room`), and that keeps what a model was trained with
(`Instructions`): `prepare` writes it into the manifest, a checkpoint and an export carry it as
`instructions.json`. No torch import.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from lbr_ds.errors import CheckpointError, ConfigError, DataError, short
from lbr_ds.system.yaml_json import read_json

NAME = "instructions.json"
Side = Literal["query", "document"]
SIDES: tuple[Side, ...] = ("query", "document")
MIN_TEXT = 8  # tokens that an instruction must leave for the text itself
MAX_ROWS = 64  # distinct instructions that are listed; a corpus may have one for each record
_SHOWN = 60  # characters of an instruction in a message


class _Named(Protocol):
    """What of a record a message names."""

    @property
    def id(self) -> str: ...
    @property
    def source(self) -> str: ...


class Instructed(str):
    """`{instruction}{text}`, which remembers where the instruction ends and whose text it is.

    It is the string that a tokenizer gets; only what has to know the parts looks at them.
    """

    instruction: str
    text: str
    where: str

    def __new__(cls, instruction: str, text: str, where: str = "") -> Instructed:
        """where: names the text in messages ("record r5 of icd10cm")."""
        made = super().__new__(cls, instruction + text)
        made.instruction, made.text, made.where = instruction, text, where
        return made

    def __getnewargs__(self) -> tuple[str, str, str]:  # type: ignore[override]
        return self.instruction, self.text, self.where


def instruct(instruction: str, text: str, record: _Named) -> str:
    """`text` after `instruction`; without one the same string, which takes no memory of its own."""
    if not instruction:
        return text
    return Instructed(instruction, text, f"record {record.id} of {record.source}")


def instruction_of(text: str) -> str:
    """Return the instruction before `text`; "" for a plain string."""
    return text.instruction if isinstance(text, Instructed) else ""


def bare(text: str) -> str:
    """`text` without its instruction."""
    return text.text if isinstance(text, Instructed) else text


def check_room(where: str, instruction: str, tokens: int, others: int, max_length: int) -> None:
    """Raise DataError when an instruction leaves fewer than MIN_TEXT tokens for the text.

    Args:
        where: Names the record or the source in the message.
        instruction: The instruction; an empty one always fits.
        tokens: Its length in tokens.
        others: Tokens of the bottleneck and special tokens around a text.
        max_length: The recipe's `model.max_length`.
    """
    left = max_length - tokens - others
    if not instruction or left >= MIN_TEXT:
        return
    shown = instruction if len(instruction) <= _SHOWN else instruction[:_SHOWN] + "..."
    raise DataError(
        f"{where or 'a text'}: its instruction {shown!r} has {tokens} tokens, bottleneck and "
        f"special tokens are {others}, which leaves {max(left, 0)} of model.max_length={max_length}"
        f" for the text (at least {MIN_TEXT} are needed); shorten the instruction or raise "
        f"model.max_length to {tokens + others + MIN_TEXT}"
    )


def pooling_fault(pooling: str, pool_instruction: bool, bottleneck: int) -> str:
    """Why an instruction's tokens cannot be left out of mean pooling, with the cure; else "".

    sentence-transformers takes for its length the tokens of the instruction tokenised alone, less
    the end token: with a bottleneck it would leave out as many tokens of the text too.
    """
    if pooling != "mean" or pool_instruction or bottleneck == 0:
        return ""
    return (
        f"model.pool_instruction=false with bottleneck.count={bottleneck}: the export would leave "
        "out tokens of the text too; set bottleneck.count to 0, or pool_instruction to true"
    )


@dataclass(frozen=True)
class Used:
    """The instructions that some records of a source have.

    query: None where they are plain passages, which have no query. records: how many, by split.
    """

    source: str
    query: str | None
    document: str
    records: dict[str, int]


@dataclass(frozen=True)
class Instructions:
    """Which source uses which instructions; rows with no instruction at all count too.

    more: records whose instructions are not listed, since there are more than MAX_ROWS of them.
    """

    rows: tuple[Used, ...] = ()
    more: int = 0

    def plain(self) -> dict[str, Any]:
        """As JSON has it."""
        return {"rows": [asdict(row) for row in self.rows], "more": self.more}

    @classmethod
    def of(cls, plain: Any) -> Instructions:
        """Build from the result of `plain`; {}: no instructions. Raises TypeError or KeyError."""
        if not plain:
            return cls()
        rows = tuple(Used(**row) for row in plain["rows"])
        for row in rows:
            if not all(isinstance(t, str) for t in (row.source, row.query or "", row.document)):
                raise TypeError(f"instructions of {row.source!r} are not text")
        return cls(rows, int(plain["more"]))

    def within(self, split: str) -> Instructions:
        """Those of the records of one split: what a stage that reads it was trained with."""
        rows = tuple(row for row in self.rows if row.records.get(split))
        return Instructions(rows, self.more)

    @property
    def any(self) -> bool:
        """Whether any record has an instruction."""
        return self.more > 0 or any(row.query or row.document for row in self.rows)

    def distinct(self, side: Side) -> list[str]:
        """Return the distinct instructions of one side, most frequent first; "" counts as one."""
        found = (getattr(row, side) for row in self.rows)
        return list(dict.fromkeys(text for text in found if text is not None))

    def only(self, side: Side) -> str | None:
        """Return the one instruction that all records share on a side; None where they differ."""
        found = self.distinct(side)
        if self.more or len(found) > 1:
            return None
        return found[0] if found else ""

    def prompts(self) -> dict[str, str]:
        """Return the prompts of a sentence-transformers folder: `query` and `document`.

        Where the records of a side differ, its own prompt is empty and every instruction has a name
        of its own: `query-SOURCE`, and `query-SOURCE-2` for a source's next one.
        """
        prompts: dict[str, str] = {side: self.only(side) or "" for side in SIDES}
        for side in SIDES:
            if self.only(side) is None:
                prompts |= self._named(side)
        return prompts

    def _named(self, side: Side) -> dict[str, str]:
        named: dict[str, str] = {}
        for row in self.rows:
            if not (text := getattr(row, side)):
                continue
            name, count = f"{side}-{row.source}", 1
            while named.setdefault(name, text) != text:
                count += 1
                name = f"{side}-{row.source}-{count}"
        return named

    def stated(self) -> list[Instructed]:
        """Each that is listed, before an empty text; for a check of their room."""
        return [
            Instructed(text, "", f"source {row.source}, {side} side")
            for row in self.rows
            for side in SIDES
            if (text := getattr(row, side))
        ]

    def of_source(self, source: str, model: str) -> Instructions:
        """Those of one source. Raises ConfigError, naming `model`, for another."""
        rows = tuple(row for row in self.rows if row.source == source)
        if not rows:
            known = ", ".join(dict.fromkeys(row.source for row in self.rows)) or "none"
            raise ConfigError(
                f"--instructions-of {short(source, 100)}: {model} was not trained with a source of "
                f"that name; choose one of: {known}"
            )
        return Instructions(rows)

    def unsettled(self) -> list[Side]:
        """Return the sides on which records differ, so that no instruction can be the default."""
        return [side for side in SIDES if self.only(side) is None]

    def save(self, folder: Path) -> None:
        """Write `folder/instructions.json`."""
        text = json.dumps(self.plain(), indent=1, ensure_ascii=False)
        (folder / NAME).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Instructions:
        """Read those of a model's folder, if it has any. Raises CheckpointError."""
        path = folder / NAME
        if not path.is_file():
            return cls()
        cure = "restore it from a copy of this folder, or use another checkpoint"
        plain = read_json(path, "the instructions of a model", CheckpointError, cure)
        try:
            return cls.of(plain)
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path}: not a valid {NAME} ({short(error)}); {cure}") from None
