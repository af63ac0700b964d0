"""Encode texts with any embedding model: a run, a checkpoint, an export, or a model by name.

    from lbr_ds import Encoder

    encoder = Encoder("runs/demo")
    queries = encoder.encode_queries(["acute pain"])                    # (1, D) float32
    query = encoder.encode_queries("acute pain")                        # (D,) float32
    documents = encoder.encode_documents(["sudden pain", "a cyst"])     # (2, D) float32
    scores = queries @ documents.T                                      # cosine similarities

`lbr-ds eval` and `lbr-ds mine` encode with this class too, so vectors made here rank as they do.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lbr_ds.errors import ConfigError
from lbr_ds.instructions import Instructed, Instructions, Side, bare
from lbr_ds.runs import resolve_model
from lbr_ds.system.locate import cached_sha256
from lbr_ds.system.progress import no_progress, show_progress

if TYPE_CHECKING:
    import torch
    from sentence_transformers import SentenceTransformer

    from lbr_ds.model.packed_encoder import PackedEncoder


class Encoder:
    """An embedding model behind one interface. Weights are loaded at the first use.

    A run, a stage, a checkpoint or a model folder is encoded by the forward code of training
    (packed, without padding); an export, any other folder and a name by sentence-transformers.

    Args:
        model: A folder of one of these kinds, or a name that sentence-transformers can download.
        device: "cpu", "cuda", "cuda:1", ...; None: the first GPU if there is one.
        dtype: Of the weights, such as `torch.float32`; None: as stored, but fp32 on a CPU without
            bf16 instructions.
        batch_tokens: Tokens per forward pass of packed encoding; None: a value that suits the
            device. It changes speed and memory, not the vectors.
        batch_size: Texts per forward pass of sentence-transformers, which pads them.
        trust_remote_code: Whether code from a model's repository may run.
        bottleneck: Append only this many bottleneck tokens to each text, the first ones; None: as
            many as in training. `lbr-ds eval --bottleneck` measures what fewer tokens cost.
        instructions_of: The data source whose instructions are the default, for an lbr-ds model
            whose sources had different ones. Without it such a model uses none by default.

    Attributes:
        name: `model` as it was given.
        folder: The folder of the weights; None for a name.
        ours: Whether lbr-ds trained or prepared the model.
        instructions: What it was trained with; empty for other models.

    Raises:
        ConfigError: The folder is missing or holds no model, or `instructions_of` is unknown. At
            the first use: the model needs `trust_remote_code` or its weights are pickles.
        CheckpointError: The model is damaged or incomplete.
        EnvironmentProblem: At the first use: a name cannot be downloaded or loaded.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        device: str | None = None,
        dtype: torch.dtype | None = None,
        batch_tokens: int | None = None,
        batch_size: int = 64,
        trust_remote_code: bool = False,
        instructions_of: str = "",
        bottleneck: int | None = None,
    ) -> None:
        self.name = str(model)
        resolved = resolve_model(self.name)
        self.folder, self.ours, self.packed = resolved.folder, resolved.ours, resolved.packed
        self.device, self.dtype = device, dtype
        self.batch_tokens, self.batch_size = batch_tokens, batch_size
        self.trust_remote_code, self.bottleneck = trust_remote_code, bottleneck
        if bottleneck is not None and not self.packed:
            raise ConfigError(
                f"{self.name}: bottleneck={bottleneck} needs a run, a checkpoint or a model "
                "folder; an export has a fixed number of tokens (lbr-ds export --bottleneck)"
            )
        self.instructions = Instructions()
        if self.ours and self.folder is not None:
            self.instructions = Instructions.load(self.folder)
            if instructions_of:
                self.instructions = self.instructions.of_source(instructions_of, self.name)

    def encode_queries(
        self, texts: str | Sequence[str], instruction: str | None = None, *, progress: bool = False
    ) -> NDArray[np.float32]:
        """Encode texts as queries.

        Args:
            texts: N texts, or one text as a plain string.
            instruction: Text before each query; "": none; None: the model's own (of training, or
                the `query` prompt of a sentence-transformers model).
            progress: Whether to show the progress on stderr.

        Returns:
            (N, D) float32, L2-normalised, in the order of `texts`; (D,) for a plain string.
        """
        return self._encode_side(texts, "query", instruction, progress)

    def encode_documents(
        self, texts: str | Sequence[str], instruction: str | None = None, *, progress: bool = False
    ) -> NDArray[np.float32]:
        """Encode texts as documents; arguments and result are those of `encode_queries`."""
        return self._encode_side(texts, "document", instruction, progress)

    def _encode_side(
        self, texts: str | Sequence[str], side: Side, instruction: str | None, progress: bool
    ) -> NDArray[np.float32]:
        if isinstance(texts, str):
            return self._encode_side([texts], side, instruction, progress).squeeze(0)
        if self.ours:
            own = self.instructions.only(side) if instruction is None else instruction
            return self.encode([Instructed(own or "", t) for t in texts], side, progress=progress)
        if instruction is None:
            return self.encode(texts, side, progress=progress)
        return self._by_sentences(list(texts), side, progress, prompt=instruction)

    def encode(
        self, texts: str | Sequence[str], side: Side, *, progress: bool = False
    ) -> NDArray[np.float32]:
        """Encode texts that may carry an instruction each (`Instructed`).

        An lbr-ds model reads each text after its own instruction, and nothing before a plain
        string. Any other model reads the bare text after its own prompt for `side`.

        Args:
            texts: N texts, or one text as a string.
            side: Whether the texts are queries or documents.
            progress: Whether to show the progress on stderr.

        Returns:
            (N, D) float32, L2-normalised, in the order of `texts`; (D,) for one string.

        Raises:
            DataError: An instruction leaves no room for its text.
        """
        if isinstance(texts, str):
            return self.encode([texts], side, progress=progress).squeeze(0)
        if not texts:
            return np.empty((0, self.dimension), np.float32)
        if self.packed:
            with show_progress() if progress else nullcontext(no_progress) as report:
                return self.packed_model.encode(list(texts), self.batch_tokens, report)
        if self.ours:
            options: dict[str, Any] = self._options(progress)
            return self._export.encode(list(texts), **options)
        return self._by_sentences([bare(text) for text in texts], side, progress)

    def _by_sentences(
        self, texts: list[str], side: Side, progress: bool, prompt: str | None = None
    ) -> NDArray[np.float32]:
        model = self.sentence_model
        encode = model.encode_query if side == "query" else model.encode_document
        options = self._options(progress)
        return np.asarray(
            encode(texts, prompt=prompt, normalize_embeddings=True, **options), np.float32
        )

    def _options(self, progress: bool) -> dict[str, Any]:
        bar = progress and sys.stderr.isatty()
        return {"batch_size": self.batch_size, "show_progress_bar": bar}

    @property
    def dimension(self) -> int:
        """Components of a vector."""
        if self.packed:
            return int(self.packed_model.model.backbone.config.hidden_size)
        return int(self.sentence_model.get_embedding_dimension() or 0)

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits that change with the model's content.

        Of a folder: the names and bytes of its files. Of a name: the loaded weights, since other
        programs decide where its files are.
        """
        digest = hashlib.sha256()
        if self.bottleneck is not None:
            digest.update(f"bottleneck={self.bottleneck} ".encode())
        if self.folder is not None:
            for path in sorted(p for p in self.folder.rglob("*") if p.is_file()):
                digest.update(f"{path.relative_to(self.folder)} {cached_sha256(path)}\n".encode())
        else:
            digest.update(self.name.encode())
            for name, tensor in sorted(self.sentence_model.state_dict().items()):
                digest.update(name.encode())
                digest.update(tensor.cpu().float().numpy().tobytes())
        return digest.hexdigest()[:16]

    def load(self) -> None:
        """Load the weights now instead of at the first use."""
        _ = self.packed_model if self.packed else self.sentence_model

    @cached_property
    def packed_model(self) -> PackedEncoder:
        """The model behind a run, a checkpoint or a model folder."""
        from lbr_ds.model.packed_encoder import PackedEncoder

        assert self.folder is not None
        return PackedEncoder(
            self.folder,
            self.device,
            self.dtype,
            trust_remote_code=self.trust_remote_code,
            bottleneck=self.bottleneck,
        )

    @cached_property
    def sentence_model(self) -> SentenceTransformer:
        """The sentence-transformers model behind an export, another folder or a name."""
        from lbr_ds.model.stock import load_sentences

        options: dict[str, Any] = {} if self.device is None else {"device": self.device}
        if self.dtype is not None:
            options["model_kwargs"] = {"dtype": self.dtype}
        place = self.name if self.folder is None else str(self.folder)
        return load_sentences(place, trust_remote_code=self.trust_remote_code, **options)

    @cached_property
    def _export(self) -> Any:
        from lbr_ds.model.sentences import Exported

        assert self.folder is not None
        return Exported(self.folder, self.sentence_model)


def folder_hash(folder: Path) -> str:
    """Return 16 hex digits of the names and bytes of a folder's files."""
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        digest.update(f"{path.relative_to(folder)} {cached_sha256(path)}\n".encode())
    return digest.hexdigest()[:16]


def weights_hash(name: str, weights: Mapping[str, torch.Tensor]) -> str:
    """Return 16 hex digits of a model's name and weights."""
    digest = hashlib.sha256(name.encode())
    for key, tensor in sorted(weights.items()):
        digest.update(key.encode())
        digest.update(tensor.cpu().float().numpy().tobytes())
    return digest.hexdigest()[:16]
