"""Encode with an exported folder in sentence-transformers, with an instruction for each text."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from lbr_ds.batching import TextTokenizer
from lbr_ds.instructions import bare, instruction_of
from lbr_ds.model.bottleneck import Card, load_tokenizer


class Exported:
    """An exported model that encodes each text after its own instruction.

    Args:
        folder: The exported folder.
        model: The `SentenceTransformer` that was loaded from it.
    """

    def __init__(self, folder: Path, model: Any) -> None:
        card = Card.load(folder)
        self.model = model
        self.pools_instruction = card.pool_instruction or card.pooling != "mean"
        self.tokenizer = TextTokenizer(
            load_tokenizer(folder), max_length=card.max_length, num_bottleneck=card.num_bottleneck
        )

    def encode(self, texts: list[str], **options: Any) -> np.ndarray:
        """Encode texts that may be `Instructed`.

        Args:
            texts: At least one. A plain string has no instruction.
            options: For `SentenceTransformer.encode`, such as `batch_size`.

        Returns:
            (N, D) float32, in the order of `texts`.

        Raises:
            DataError: If an instruction leaves no room for its text.
        """
        self.tokenizer.check(texts)
        if self.pools_instruction:
            whole = [str(text) for text in texts]
            return np.asarray(self.model.encode(whole, prompt="", **options), np.float32)
        places: dict[str, list[int]] = defaultdict(list)
        for place, text in enumerate(texts):
            places[instruction_of(text)].append(place)
        vectors: dict[int, np.ndarray] = {}
        for instruction, numbers in places.items():
            part = [bare(texts[i]) for i in numbers]
            rows = np.asarray(self.model.encode(part, prompt=instruction, **options), np.float32)
            vectors |= dict(zip(numbers, rows, strict=True))
        return np.stack([vectors[i] for i in range(len(texts))])
