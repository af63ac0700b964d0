"""Load a model's tokenizer; name in one line what is missing: a package, an end or pad token."""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from lbr_ds.errors import CheckpointError, ConfigError, EnvironmentProblem
from lbr_ds.model.trust import why_not

log = logging.getLogger(__name__)
_SENTENCEPIECE = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")


def open_tokenizer(
    what: str, name: str, *, trust_remote_code: bool = False, **options: Any
) -> PreTrainedTokenizerBase:
    """Open the fast tokenizer of a folder or a hub name.

    Args:
        what: the model, for messages.
        name: folder or hub name.
        trust_remote_code: whether code that the model brings may run.
        **options: for `AutoTokenizer.from_pretrained`.

    Raises:
        EnvironmentProblem: a package that reads it is missing.
        ConfigError: it cannot be loaded, or it is not a fast tokenizer.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            name, trust_remote_code=trust_remote_code, **options
        )
    except (ConfigError, CheckpointError):
        raise
    except Exception as error:  # each format's reader raises its own
        if cure := lacking(Path(name)):
            raise EnvironmentProblem(f"{what}: {cure}") from None
        again = "; copy or fetch the GGUF file again" if "gguf_file" in options else ""
        raise ConfigError(
            f"{what}: its tokenizer cannot be loaded: {why_not(error)}{again}"
        ) from None
    if not tokenizer.is_fast:
        raise ConfigError(
            f"{what} has no fast tokenizer; convert it to a tokenizer.json "
            "(transformers.convert_slow_tokenizer), or use a model that has one"
        )
    return tokenizer


def lacking(folder: Path) -> str:
    """Return which package is missing to read a folder's tokenizer, and the cure; empty if none."""
    if (folder / "tokenizer.json").is_file() or importlib.util.find_spec("sentencepiece"):
        return ""
    for file in _SENTENCEPIECE:
        # Llama 3 has a file of this name in another format: lines of base64.
        if (folder / file).is_file() and (folder / file).open("rb").read(1) == b"\n":
            return (
                f"its tokenizer is a SentencePiece model ({file}, no tokenizer.json), which needs "
                "a package that is missing: pip install 'lbr-ds[sentencepiece]'"
            )
    return ""


def ensure_end(what: str, tokenizer: PreTrainedTokenizerBase, module: PreTrainedModel) -> None:
    """Give the tokenizer an end token where only the model's config names one.

    Targets end with it.

    Raises:
        ConfigError: there is none.
    """
    if tokenizer.eos_token is not None:
        return
    named = getattr(module.generation_config, "eos_token_id", None) or module.config.eos_token_id
    number = named[0] if isinstance(named, list) else named
    if not isinstance(number, int) or not 0 <= number < len(tokenizer):
        raise ConfigError(
            f"{what}: its tokenizer has no end token (eos), with which targets end; name one as "
            "eos_token in its tokenizer_config.json"
        )
    tokenizer.eos_token = str(tokenizer.convert_ids_to_tokens(number))
    log.warning(
        "%s: its tokenizer names no end token; %r of its config is used", what, tokenizer.eos_token
    )


def ensure_padding(what: str, tokenizer: Any) -> None:
    """Give a tokenizer without a pad token one, so that texts can be encoded in batches.

    Padding is masked, so it does not matter which token is used.
    """
    if getattr(tokenizer, "pad_token", "") is not None:
        return
    known = [tokenizer.eos_token, tokenizer.unk_token, tokenizer.bos_token]
    filling = next((token for token in known if token is not None), None)
    tokenizer.pad_token = filling or tokenizer.convert_ids_to_tokens(0)
    log.warning(
        "%s: its tokenizer has no pad token; batches are padded with %r",
        what,
        tokenizer.pad_token,
    )
