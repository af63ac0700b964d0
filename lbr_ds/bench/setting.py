"""What the rows of a suite are measured with, and what they share."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from lbr_ds.bench.measure import ROUNDS

T = TypeVar("T")


@dataclass
class Setting:
    """Options of a suite's run, and one value that rows may share.

    Attributes:
        quick: tiny sizes and few rounds, to run every row's code once.
        rounds: rounds of a row of times.
        data: texts for suites that take them; None: made up, or the demo's corpus.
    """

    quick: bool = False
    rounds: int = ROUNDS
    data: Path | None = None
    _stack: ExitStack = field(default_factory=ExitStack)
    _key: Hashable = None
    _value: Any = None

    def shared(self, key: Hashable, open_it: Callable[[], AbstractContextManager[T]]) -> T:
        """Return what the context manager `open_it()` yields, entering it only for a new key.

        It stays open for later rows with the same key. Only one value is kept, since the memory of
        a device is needed for the next one.
        """
        if key != self._key:
            self.release()
            self._value = self._stack.enter_context(open_it())
            self._key = key
        value: T = self._value
        return value

    def release(self) -> None:
        """Close the shared value, if there is one."""
        self._key = self._value = None
        self._stack.close()
