"""Text -> token ids with the bottleneck in place.

The prepared tokenizer appends the K bottleneck tokens itself (model/bottleneck.py), and cuts a long
text so that they stay. So a text is encoded here exactly as sentence-transformers or a server will.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerBase

from lbr_ds.errors import DataError
from lbr_ds.records import Record


@dataclass(frozen=True)
class Sequence:
    """One sequence: `[X ; B]` in `context`, then Y in `target`.

    num_bottleneck: how many ids at the end of `context` are bottleneck tokens. cut: whether Y may
    see only B and itself (the information bottleneck) or all of `context` too (plain causal).
    bag: the distinct ids that the state at the end of `context` is to predict by itself.
    """

    context: list[int]
    num_bottleneck: int
    target: list[int] = field(default_factory=list)
    cut: bool = True
    bag: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.context) + len(self.target)


class TextEncoder:
    """A prepared tokenizer with the lengths of the recipe."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, *, max_length: int, num_bottleneck: int
    ) -> None:
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.num_bottleneck = num_bottleneck
        # What the tokenizer puts before and after a text: [bos] and the bottleneck tokens.
        self._affixes = len(tokenizer("")["input_ids"])
        self.special_ids = frozenset(tokenizer.all_special_ids)  # the tokenizer looks each up anew
        self._instructions: dict[str, int] = {"": 0}  # tokens of each instruction seen so far
        self._parts: dict[int, bool] = {}

    def contexts(self, texts: list[str]) -> list[list[int]]:
        """`[X ; B]` of each text, at most `max_length` ids, the bottleneck always whole."""
        return self.tokenizer(texts, truncation=True, max_length=self.max_length)["input_ids"]

    def query(self, record: Record) -> str:
        """The query of a record with its instruction in front, as it is encoded.

        Raises DataError where the instruction leaves no room for the query: every such query would
        be cut to the same ids.
        """
        tokens = self._instructions.get(record.instruction)
        if tokens is None:
            tokens = len(self.plain(record.instruction, self.max_length))
            self._instructions[record.instruction] = tokens
        room = self.max_length - self._affixes
        if tokens >= room and record.instruction:
            raise DataError(
                f"record {record.id}: its instruction fills all {room} tokens that "
                f"model.max_length={self.max_length} leaves for instruction and query; "
                "shorten the instruction or raise model.max_length"
            )
        return record.instruction + record.query

    def plain(self, text: str, limit: int) -> list[int]:
        """At most `limit` ids of the text alone: nothing before it, nothing after it."""
        return self.tokenizer(text, truncation=True, max_length=limit, add_special_tokens=False)[
            "input_ids"
        ]

    def target(self, text: str, limit: int) -> list[int]:
        """Y: the text's ids and the end token, at most `limit` together.

        A text that is cut has no end token, or the model would learn to stop in mid-sentence.
        """
        return [*self.plain(text, limit), self.tokenizer.eos_token_id][:limit]

    def wrap(self, ids: list[int]) -> list[int]:
        """`[X ; B]` from X's bare ids."""
        empty = self.tokenizer("")["input_ids"]
        ids = ids[: self.max_length - self._affixes]
        split = len(empty) - self.num_bottleneck
        return [*empty[:split], *ids, *empty[split:]]

    def is_part(self, token: int) -> bool:
        """Whether a token is only some of the bytes of a character, so that it cannot be decoded
        by itself."""
        if token not in self._parts:
            self._parts[token] = "\ufffd" in str(self.tokenizer.decode([token]))
        return self._parts[token]

    def text(self, ids: list[int]) -> str:
        """The text of written ids, without special tokens and outer blanks."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True)).strip()

    def embed(self, texts: list[str]) -> list[Sequence]:
        """The sequences whose read-out is the texts' vectors."""
        return [Sequence(ids, self.num_bottleneck) for ids in self.contexts(texts)]
