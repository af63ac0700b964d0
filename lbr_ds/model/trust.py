"""What comes from others is read, never run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from transformers import dynamic_module_utils

from lbr_ds.errors import ConfigError, short

# For every `from_pretrained` of what others made: a .bin or .pt file is a pickle.
SAFE = {"use_safetensors": True}


@contextmanager
def no_pickles(name: str) -> Iterator[None]:
    """Let torch open no pickle while entered, whichever library asks; `name` is the model's.

    Nor does transformers ask on the terminal whether a repository's code may run, where a library
    has passed no `trust_remote_code` on: it refuses.

    `weights_only=True` is no boundary (CVE-2025-32434, CVE-2026-24747), and sentence-transformers
    falls back to `pytorch_model.bin` for the layers that are not transformers. Raises ConfigError.
    """

    def refuse(*args: Any, **options: Any) -> None:
        raise ConfigError(
            f"{name}: its weights are pickles (.bin, .pt), which could run code when they are "
            "opened; convert them to safetensors where you trust them"
        )

    with (
        mock.patch.object(torch, "load", refuse),
        mock.patch.object(dynamic_module_utils, "TIME_OUT_REMOTE_CODE", 0),
    ):
        yield


def why_not(error: Exception) -> str:
    """What kept a model of others from being loaded, in a line's part."""
    text = " ".join(str(error).split()) or type(error).__name__
    if "trust_remote_code" in text:
        return "it brings code of its own, to be allowed with trust_remote_code by who trusts it"
    return short(text, 300)
