"""A folder, a run, a checkpoint or a name -> texts in, unit vectors out, and a fingerprint."""

from __future__ import annotations

import hashlib
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from lbr_ds import runs
from lbr_ds.instructions import bare
from lbr_ds.system.locate import cached_sha256

Role = Literal["query", "passage"]


class TextVectors(Protocol):
    """What `vectors.py` and `mine.py` need of a model."""

    name: str

    @property
    def fingerprint(self) -> str:
        """16 hex digits that change with the weights, the tokenizer or any setting."""
        ...

    def encode(self, texts: list[str], role: Role) -> NDArray[np.float32]:
        """(len(texts), D), each row of unit length; texts: of `Record.asked` and `told`."""
        ...


class Own:
    """A folder of ours through the trainer's own forward code. Loaded at the first text."""

    def __init__(self, name: str, folder: Path, trust_remote_code: bool = False) -> None:
        self.name, self.folder, self.trust_remote_code = name, folder, trust_remote_code

    @cached_property
    def fingerprint(self) -> str:
        """Of all files of the folder."""
        return folder_fingerprint(self.folder)

    @cached_property
    def _model(self) -> Any:
        from lbr_ds.model.encoder import PackedEncoder

        return PackedEncoder(self.folder, trust_remote_code=self.trust_remote_code)

    def encode(self, texts: list[str], role: Role) -> NDArray[np.float32]:
        """Queries and passages are encoded alike, each after its instruction."""
        vectors: NDArray[np.float32] = self._model.encode(texts)
        return vectors


class Stock:
    """A folder or a name through sentence-transformers. Loaded at the first text."""

    def __init__(self, name: str, trust_remote_code: bool = False) -> None:
        self.name, self.trust_remote_code = name, trust_remote_code

    @cached_property
    def fingerprint(self) -> str:
        """Of the folder's files; a name's files are not ours to find, so of its loaded weights."""
        folder = Path(self.name)
        if folder.is_dir():
            return folder_fingerprint(folder)
        digest = hashlib.sha256(self.name.encode())
        for name, tensor in sorted(self._model.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.cpu().float().numpy().tobytes())
        return digest.hexdigest()[:16]

    @cached_property
    def _model(self) -> Any:
        from lbr_ds.model.stock import load_sentences

        return load_sentences(self.name, trust_remote_code=self.trust_remote_code)

    @cached_property
    def _exported(self) -> Any:
        """The model as one that we exported; None for any other."""
        from lbr_ds.model.bottleneck import CARD
        from lbr_ds.model.sentences import Exported

        folder = Path(self.name)
        return Exported(folder, self._model) if (folder / CARD).is_file() else None

    def encode(self, texts: list[str], role: Role) -> NDArray[np.float32]:
        """An export of ours: each text after its instruction, as it was trained.

        Any other model: the bare text after the model's own prompt for queries or for documents,
        where it has one.
        """
        if self._exported is not None:
            own: NDArray[np.float32] = self._exported.encode(texts, show_progress_bar=False)
            return own
        texts = [bare(text) for text in texts]
        work = self._model.encode_query if role == "query" else self._model.encode_document
        found = work(texts, normalize_embeddings=True, show_progress_bar=False)
        return np.asarray(found, np.float32)


def find_encoder(model: str, trust_remote_code: bool = False) -> TextVectors:
    """Return the encoder that `model` names (see `runs.find_model`); nothing is loaded yet.

    A name is one that sentence-transformers can fetch. Raises ConfigError for a folder that is
    missing or holds no model, CheckpointError for a damaged one.
    """
    found = runs.find_model(model)
    if found.packed and found.folder is not None:
        return Own(model, found.folder, trust_remote_code)
    return Stock(model if found.folder is None else str(found.folder), trust_remote_code)


def folder_fingerprint(folder: Path) -> str:
    """Hash of the names and bytes of all files below `folder`."""
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        digest.update(f"{path.relative_to(folder)} {cached_sha256(path)}\n".encode())
    return digest.hexdigest()[:16]
