"""Texts -> vectors by the trainer's own code: packed, length-sorted, one process, no padding."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from lbr_ds.batching import TextTokenizer, pack, split_by_tokens
from lbr_ds.model.bottleneck import Card, load_tokenizer
from lbr_ds.model.complete import check_positions, load_causal
from lbr_ds.model.embedder import Embedder
from lbr_ds.system.environment import cpu_lacks_bf16
from lbr_ds.system.progress import Progress, no_progress

_BATCH_TOKENS = {False: 2048, True: 16384}  # on a CPU more leave its cache and gain nothing


class PackedEncoder:
    """A checkpoint's `model/` folder (or a prepared backbone) as an encoder of texts."""

    def __init__(
        self,
        folder: Path,
        device: str | None = None,
        dtype: torch.dtype | str | None = None,
        *,
        trust_remote_code: bool = False,
    ) -> None:
        """dtype "auto": as the weights are stored; None: so too, but fp32 on a CPU without bf16.

        Raises CheckpointError when the folder is not complete (see `complete.py`), ConfigError when
        its texts may be longer than it has positions.
        """
        self.card = Card.load(folder)
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if dtype is None:
            slow = self.device.type == "cpu" and cpu_lacks_bf16()
            dtype = torch.float32 if slow else "auto"
        backbone = load_causal(folder, dtype, trust_remote_code=trust_remote_code)
        check_positions(str(folder), backbone.config, {"max_length": self.card.max_length})
        self.model = Embedder(backbone, self.card).to(self.device).eval()
        self.tokenizer = TextTokenizer(
            load_tokenizer(folder),
            max_length=self.card.max_length,
            num_bottleneck=self.card.num_bottleneck,
            pool_instruction=self.card.pool_instruction,
        )

    @torch.inference_mode()
    def encode(
        self,
        texts: list[str],
        batch_tokens: int | None = None,
        progress: Progress = no_progress,
    ) -> np.ndarray:
        """(N, D) float32, unit length, in the order of `texts`.

        batch_tokens: of one forward; None: as many as keep the device busy and no more. The longest
        texts go first, so memory faults come at once.
        """
        batch_tokens = batch_tokens or _BATCH_TOKENS[self.device.type == "cuda"]
        sequences = self.tokenizer.embed(texts)
        order = sorted(range(len(texts)), key=lambda i: -len(sequences[i]))
        sequences = [sequences[i] for i in order]
        vectors = np.empty((len(texts), self.model.backbone.config.hidden_size), np.float32)
        batches = split_by_tokens(sequences, batch_tokens)
        # The copy to the host waits for the device; a batch late, so that the next one is packed
        # and on its way meanwhile.
        done: list[tuple[list[int], torch.Tensor]] = []
        count = 0
        for chosen in batches:
            batch = pack([sequences[i] for i in chosen]).to(self.device)
            done.append(([order[i] for i in chosen], self.model(batch)))
            count += len(chosen)
            progress("encode", count, len(texts))
            if len(done) > 1:
                places, found = done.pop(0)
                vectors[places] = found.cpu().numpy()
        for places, found in done:
            vectors[places] = found.cpu().numpy()
        return vectors
