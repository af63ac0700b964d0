"""Text -> token ids with the bottleneck in place.

The prepared tokenizer appends the K bottleneck tokens itself (model/bottleneck.py), and cuts a long
text so that they stay. So a text is encoded here exactly as sentence-transformers or a server will.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerBase

from lbr_ds.instructions import Instructed, check_room, instruction_of

_SIZES_KEPT = 4096  # instructions whose length is remembered


@dataclass(frozen=True)
class Sequence:
    """One sequence: `[X ; B]` in `context`, then Y in `target`.

    num_bottleneck: how many ids at the end of `context` are bottleneck tokens. cut: whether Y may
    see only B and itself (the information bottleneck) or all of `context` too (plain causal).
    bag: the distinct ids that the state at the end of `context` is to predict by itself. unpooled:
    how many ids at the start of `context` (the instruction's) mean pooling leaves out.
    """

    context: list[int]
    num_bottleneck: int
    target: list[int] = field(default_factory=list)
    cut: bool = True
    bag: list[int] = field(default_factory=list)
    unpooled: int = 0

    def __len__(self) -> int:
        return len(self.context) + len(self.target)


class TextEncoder:
    """A prepared tokenizer with the lengths of the recipe.

    pool_instruction: whether mean pooling includes the tokens of a text's instruction.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_length: int,
        num_bottleneck: int,
        pool_instruction: bool = True,
    ) -> None:
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.num_bottleneck = num_bottleneck
        self.pool_instruction = pool_instruction
        self._sizes: dict[str, int] = {"": 0}  # tokens of instructions that have room
        # What the tokenizer puts before and after a text: [bos] and the bottleneck tokens.
        self._affixes = len(tokenizer("")["input_ids"])
        self.special_ids = frozenset(tokenizer.all_special_ids)  # the tokenizer looks each up anew
        self._parts: dict[int, bool] = {}

    def contexts(self, texts: list[str]) -> list[list[int]]:
        """`[X ; B]` of each text, at most `max_length` ids, the bottleneck always whole.

        Raises DataError for an `Instructed` text whose instruction leaves no room for it.
        """
        self.check(texts)
        return self.tokenizer(texts, truncation=True, max_length=self.max_length)["input_ids"]

    def plain(self, text: str, limit: int) -> list[int]:
        """At most `limit` ids of the text alone: nothing before it, nothing after it."""
        self._make_sure_of_room(text)
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

    def instruction_size(self, instruction: str, where: str = "") -> int:
        """The tokens of an instruction alone, counted once each.

        Raises DataError, with `where` in the message, when it leaves no room for a text.
        """
        if (known := self._sizes.get(instruction)) is not None:
            return known
        size = len(self.tokenizer(instruction, add_special_tokens=False)["input_ids"])
        check_room(where, instruction, size, self._affixes, self.max_length)
        if len(self._sizes) >= _SIZES_KEPT:
            self._sizes = {"": 0}
        self._sizes[instruction] = size
        return size

    def instruction_ids(self, text: str) -> list[int]:
        """The ids of the instruction before `text`, without the text."""
        self._make_sure_of_room(text)
        return self.plain(instruction_of(text), self.max_length)

    def _make_sure_of_room(self, text: str) -> None:
        if isinstance(text, Instructed):
            self.instruction_size(text.instruction, text.where)

    def check(self, texts: Iterable[str]) -> None:
        """Raise DataError for the first text whose instruction leaves no room for it."""
        for text in texts:
            self._make_sure_of_room(text)

    def embed(self, texts: list[str]) -> list[Sequence]:
        """The sequences whose read-out is the texts' vectors."""
        contexts = self.contexts(texts)
        if self.pool_instruction:
            return [Sequence(ids, self.num_bottleneck) for ids in contexts]
        return [
            Sequence(ids, self.num_bottleneck, unpooled=self._unpooled(instruction_of(text)))
            for ids, text in zip(contexts, texts, strict=True)
        ]

    def _unpooled(self, instruction: str) -> int:
        """The rows that sentence-transformers leaves out with `include_prompt: false`: [bos] too.

        It counts the instruction tokenised alone, less the end token; so there is no bottleneck
        here (`instructions.pooling_fault`).
        """
        before = self._affixes - 1
        return before + self.instruction_size(instruction) if instruction else 0
