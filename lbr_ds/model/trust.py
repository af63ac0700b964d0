"""Load third-party models without running what is in them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import dynamic_module_utils

from lbr_ds.errors import ConfigError, short

# For every `from_pretrained` of what others made: a .bin or .pt file is a pickle.
SAFE = {"use_safetensors": True}


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Replace an attribute of a module or class while entered."""
    original = vars(owner)[name]
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)


@contextmanager
def no_pickles(name: str) -> Iterator[None]:
    """Refuse every pickle that a library opens through torch while entered.

    Where a library does not pass `trust_remote_code` on, transformers would ask on the terminal
    whether a repository's code may run; it refuses instead.

    `weights_only=True` is no boundary (CVE-2025-32434, CVE-2026-24747), and sentence-transformers
    falls back to `pytorch_model.bin` for the layers that are not transformers.

    Args:
        name: of the model, for the message.

    Raises:
        ConfigError: a library opens a pickle.
    """

    def refuse(*args: Any, **options: Any) -> None:
        raise ConfigError(
            f"{name}: its weights are pickles (.bin, .pt), which could run code when they are "
            "opened; convert them to safetensors where you trust them"
        )

    with (
        replaced(torch, "load", refuse),
        replaced(dynamic_module_utils, "TIME_OUT_REMOTE_CODE", 0),
    ):
        yield


def why_not(error: Exception) -> str:
    """Return a one-line reason why a third-party model failed to load."""
    text = " ".join(str(error).split()) or type(error).__name__
    if "trust_remote_code" in text:
        return "it brings code of its own; set trust_remote_code if you trust it"
    return short(text, 300)
