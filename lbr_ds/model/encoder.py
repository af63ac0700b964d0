"""Texts -> vectors by the trainer's own code: packed, length-sorted, one process, no padding."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from lbr_ds.batching import TextEncoder, pack, split_by_tokens
from lbr_ds.model.bottleneck import Card, load_tokenizer
from lbr_ds.model.embedder import Embedder
from lbr_ds.model.trust import SAFE


class PackedEncoder:
    """A checkpoint's `model/` folder (or a prepared backbone) as an encoder of texts."""

    def __init__(
        self, folder: Path, device: str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        """dtype None: as the weights are stored."""
        self.card = Card.load(folder)
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        backbone = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype or "auto", **SAFE)
        self.model = Embedder(backbone, self.card).to(self.device).eval()
        self.texts = TextEncoder(
            load_tokenizer(folder),
            max_length=self.card.max_length,
            num_bottleneck=self.card.num_bottleneck,
        )

    @torch.no_grad()
    def encode(
        self, texts: list[str], batch_tokens: int = 8192, progress: bool = False
    ) -> np.ndarray:
        """(N, D) float32, unit length, in the order of `texts`."""
        sequences = self.texts.embed(texts)
        order = sorted(range(len(texts)), key=lambda i: len(sequences[i]))
        sequences = [sequences[i] for i in order]
        vectors = np.empty((len(texts), self.model.backbone.config.hidden_size), np.float32)
        batches = split_by_tokens(sequences, batch_tokens)
        for chosen in _tracked(batches) if progress else batches:
            batch = pack([sequences[i] for i in chosen]).to(self.device)
            vectors[[order[i] for i in chosen]] = self.model(batch).cpu().numpy()
        return vectors


def _tracked(batches: list[list[int]]) -> list[list[int]]:
    from rich.progress import track

    return track(batches, description="encode")  # type: ignore[return-value]
