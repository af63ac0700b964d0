"""Texts -> vectors by the trainer's own code: packed, length-sorted, one process, no padding."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from lbr_ds.batching import TextTokenizer, pack, split_by_tokens
from lbr_ds.model.bottleneck import Card, load_tokenizer
from lbr_ds.model.complete import check_positions, load_causal
from lbr_ds.model.embedder import Embedder
from lbr_ds.plan.pace import encoded_together
from lbr_ds.system.environment import cpu_lacks_bf16
from lbr_ds.system.progress import Progress, no_progress


class PackedEncoder:
    """Encodes texts with the model of a checkpoint's `model/` folder or of a prepared backbone."""

    def __init__(
        self,
        folder: Path,
        device: str | None = None,
        dtype: torch.dtype | str | None = None,
        *,
        trust_remote_code: bool = False,
        bottleneck: int | None = None,
    ) -> None:
        """Load the model.

        Args:
            folder: with `lbr.json`, weights and tokenizer.
            device: None: the GPU if there is one.
            dtype: "auto": as the weights are stored; None: likewise, but fp32 on a CPU that has no
                instructions for bf16.
            trust_remote_code: whether code that the model brings may run.
            bottleneck: read texts with this many bottleneck tokens, the first ones; None: as it was
                trained.

        Raises:
            CheckpointError: the folder is not complete (see `complete.py`).
            ConfigError: its texts may be longer than the model has positions.
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
            chat=self.card.chat,
            ratio=self.card.ratio,
        )
        if bottleneck is not None:
            self.tokenizer = self.tokenizer.at(bottleneck)

    @torch.inference_mode()
    def encode(
        self,
        texts: list[str],
        batch_tokens: int | None = None,
        progress: Progress = no_progress,
    ) -> np.ndarray:
        """Return (N, D) float32 of unit length, in the order of `texts`.

        The longest texts are encoded first, so that memory errors occur at once.

        Args:
            texts: N texts.
            batch_tokens: tokens of one forward; None: enough to keep the device busy.
            progress: whether to show a bar.
        """
        batch_tokens = batch_tokens or encoded_together(cpu=self.device.type != "cuda")
        sequences = self.tokenizer.embed(texts)
        order = sorted(range(len(texts)), key=lambda i: -len(sequences[i]))
        sequences = [sequences[i] for i in order]
        vectors = np.empty((len(texts), self.model.backbone.config.hidden_size), np.float32)
        batches = split_by_tokens(sequences, batch_tokens)
        # The copy to the host waits for the device, so it is done one batch late: the next one is
        # packed and launched meanwhile.
        done: list[tuple[list[int], torch.Tensor]] = []
        count = 0
        for chosen in batches:
            batch = pack([sequences[i] for i in chosen]).to(self.device)
            done.append(([order[i] for i in chosen], self.model(batch)))
            count += len(chosen)
            progress("encode", count, len(texts))
            if len(done) > 1:
                places, encoded = done.pop(0)
                vectors[places] = encoded.cpu().numpy()
        for places, encoded in done:
            vectors[places] = encoded.cpu().numpy()
        return vectors
