"""Text -> token ids with the bottleneck in place.

The prepared tokenizer appends the K bottleneck tokens itself (model/bottleneck.py), and truncates a
long text in front of them. So a text is encoded here exactly as sentence-transformers or a server
encodes it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerBase

from lbr_ds.errors import ConfigError
from lbr_ds.instructions import Instructed, check_room, instruction_of

_SIZES_KEPT = 4096  # instructions whose length is cached


@dataclass(frozen=True)
class Sequence:
    """One sequence of token ids: `[X ; B]`, then Y.

    Attributes:
        context: `[X ; B]`.
        num_bottleneck: how many ids at the end of `context` are bottleneck tokens.
        target: Y; empty for embedding.
        cut: whether Y sees only B and itself (the information bottleneck), or all of `context`.
        bag: distinct ids that the state at the end of `context` predicts, whatever their order.
        unpooled: ids at the start of `context` (the instruction's) that mean pooling leaves out.
        kind: number of the sequence's source, for statistics; -1: none.
    """

    context: list[int]
    num_bottleneck: int
    target: list[int] = field(default_factory=list)
    cut: bool = True
    bag: list[int] = field(default_factory=list)
    unpooled: int = 0
    kind: int = -1

    def __len__(self) -> int:
        return len(self.context) + len(self.target)


class TextTokenizer:
    """A prepared tokenizer with the lengths of the recipe.

    Attributes:
        backend: the tokenizer of transformers.
        max_length: tokens of a context at most, bottleneck included.
        num_bottleneck: K, the number of bottleneck tokens; with a ratio, their maximum.
        ratio: tokens of text for each bottleneck token, or None: every text has K.
        pool_instruction: whether mean pooling includes the tokens of a text's instruction.
        special_ids: ids of the special tokens.
        chat: ids before and after X where stage 1 trains in a chat template, or None.
        contexts_end: whether the tokenizer ends every text, with the bottleneck or the end token.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_length: int,
        num_bottleneck: int,
        pool_instruction: bool = True,
        chat: tuple[list[int], list[int]] | None = None,
        ratio: float | None = None,
    ) -> None:
        self.backend = tokenizer
        self.max_length = max_length
        self.num_bottleneck = num_bottleneck
        self.ratio = ratio
        self.pool_instruction = pool_instruction
        self._sizes: dict[str, int] = {"": 0}  # tokens of the instructions that leave room
        self.chat = chat
        # Tokens that the tokenizer adds to a text: [bos] and the bottleneck tokens.
        affixes = tokenizer("")["input_ids"]
        self._affixes = len(affixes)
        self._bottleneck = affixes[len(affixes) - num_bottleneck :]  # ids that the backend appends
        self._has_end = affixes[-1:] == [tokenizer.eos_token_id]
        self.contexts_end = num_bottleneck > 0 or self._has_end
        self.special_ids = frozenset(tokenizer.all_special_ids)  # slow to compute
        self._parts: dict[int, bool] = {}

    def at(self, count: int) -> TextTokenizer:
        """Return the tokenizer of a model with the first `count` bottleneck tokens alone.

        Raises:
            ConfigError: this one does not have so many.
        """
        if not 1 <= count <= self.num_bottleneck:
            raise ConfigError(
                f"{count} bottleneck tokens: the model has {self.num_bottleneck}; give a number "
                f"from 1 to {self.num_bottleneck}"
            )
        fewer = copy.copy(self)
        fewer.num_bottleneck, fewer.ratio, fewer._sizes = count, None, {"": 0}
        fewer._affixes = self._affixes - self.num_bottleneck + count
        return fewer

    def bottleneck_of(self, context: list[int]) -> int:
        """Return how many bottleneck tokens a context ends with."""
        if self.ratio is None:
            return self.num_bottleneck
        own = frozenset(self._bottleneck)
        others = (i for i, token in enumerate(reversed(context)) if token not in own)
        return next(others, len(context))

    def _fit(self, ids: list[int]) -> list[int]:
        """Return `[X ; B]` with the text's own number of bottleneck tokens, within `max_length`."""
        end = len(ids) - len(self._bottleneck)
        count = self.num_bottleneck
        if self.ratio is not None:
            text = min(end - (self._affixes - count), self.max_length)
            count = min(count, max(1, math.ceil(text / self.ratio)))
        return [*ids[: min(end, self.max_length - count)], *self._bottleneck[:count]]

    def contexts(self, texts: list[str]) -> list[list[int]]:
        """Return `[X ; B]` of each text: at most `max_length` ids, the bottleneck always complete.

        Raises:
            DataError: the instruction of an `Instructed` text leaves no room for the text.
        """
        self.check(texts)
        fixed = self.ratio is None and self.num_bottleneck == len(self._bottleneck)
        limit = self.max_length + (0 if fixed else len(self._bottleneck))
        found = self.backend(texts, truncation=True, max_length=limit)["input_ids"]
        if not fixed:
            found = [self._fit(ids) for ids in found]
        # With `bottleneck.separator=none` an empty text has no token that could be read.
        return [ids or [self.backend.eos_token_id] for ids in found]

    def prompts(self, texts: list[str]) -> list[list[int]]:
        """Return what an answer follows in stage 1: `[X ; B]`, or X in the chat template.

        Raises:
            DataError: as `contexts`.
        """
        if self.chat is None:
            return self.contexts(texts)
        before, after = self.chat
        room = self.max_length - len(before) - len(after)
        return [[*before, *self.plain(text, room), *after] for text in texts]

    def plain(self, text: str, limit: int) -> list[int]:
        """Return at most `limit` ids of the text without special tokens."""
        self._check_room(text)
        return self.backend(text, truncation=True, max_length=limit, add_special_tokens=False)[
            "input_ids"
        ]

    def target(self, text: str, limit: int) -> list[int]:
        """Return Y: the text's ids and the end token, at most `limit` together.

        A truncated text has no end token, or the model would learn to stop in mid-sentence.
        """
        return [*self.plain(text, limit), self.backend.eos_token_id][:limit]

    @property
    def max_text(self) -> int:
        """Tokens of X at most: what the tokenizer's own tokens and the bottleneck leave."""
        return self.max_length - self._affixes

    def wrap(self, ids: list[int]) -> list[int]:
        """Return `[X ; B]` of the ids of X."""
        empty = self.backend("")["input_ids"]
        split = len(empty) - len(self._bottleneck)
        return self._fit([*empty[:split], *ids, *empty[split:]])

    def is_part(self, token: int) -> bool:
        """Return whether a token is only some bytes of a character, which cannot be decoded."""
        if token not in self._parts:
            self._parts[token] = "\ufffd" in str(self.backend.decode([token]))
        return self._parts[token]

    def text(self, ids: list[int]) -> str:
        """Decode ids, without special tokens and outer white space."""
        return str(self.backend.decode(ids, skip_special_tokens=True)).strip()

    def instruction_size(self, instruction: str, where: str = "") -> int:
        """Return the number of tokens of an instruction alone; each is counted only once.

        Raises:
            DataError: it leaves no room for a text; `where` is in the message.
        """
        if (known := self._sizes.get(instruction)) is not None:
            return known
        size = len(self.backend(instruction, add_special_tokens=False)["input_ids"])
        check_room(where, instruction, size, self._affixes, self.max_length)
        if len(self._sizes) >= _SIZES_KEPT:
            self._sizes = {"": 0}
        self._sizes[instruction] = size
        return size

    def instruction_ids(self, text: str) -> list[int]:
        """Return the ids of the instruction before `text`, without the text."""
        self._check_room(text)
        return self.plain(instruction_of(text), self.max_length)

    def _check_room(self, text: str) -> None:
        if isinstance(text, Instructed):
            self.instruction_size(text.instruction, text.where)

    def check(self, texts: Iterable[str]) -> None:
        """Raise DataError for the first text whose instruction leaves no room for it."""
        for text in texts:
            self._check_room(text)

    def embed(self, texts: list[str]) -> list[Sequence]:
        """Return the sequences whose pooled states are the texts' vectors."""
        contexts = self.contexts(texts)
        if self.pool_instruction:
            return [Sequence(ids, self.bottleneck_of(ids)) for ids in contexts]
        return [
            Sequence(ids, self.bottleneck_of(ids), unpooled=self._unpooled(instruction_of(text)))
            for ids, text in zip(contexts, texts, strict=True)
        ]

    def _unpooled(self, instruction: str) -> int:
        """Return the rows that sentence-transformers leaves out with `include_prompt: false`.

        These include [bos]. It counts the tokens of the instruction alone, less the end token; so
        there is no bottleneck here (`instructions.pooling_fault`).
        """
        before = self._affixes - self._has_end
        return before + self.instruction_size(instruction) if instruction else 0
