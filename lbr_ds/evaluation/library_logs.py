"""Keep libraries that log every step to errors."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator

import datasets

VERBOSE = ("mteb", "transformers", "sentence_transformers", "datasets", "huggingface_hub", "httpx")


@contextlib.contextmanager
def silence_libraries() -> Iterator[None]:
    """Log only errors of verbose libraries, and hide their progress bars, in this context."""
    from transformers.utils import logging as transformers_logging

    levels = {name: logging.getLogger(name).level for name in VERBOSE}
    bars = transformers_logging.is_progress_bar_enabled()
    map_bars = not datasets.are_progress_bars_disabled()
    for name in VERBOSE:
        logging.getLogger(name).setLevel(logging.ERROR)
    transformers_logging.disable_progress_bar()
    datasets.disable_progress_bars()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        if bars:
            transformers_logging.enable_progress_bar()
        if map_bars:
            datasets.enable_progress_bars()
