"""Read and write weights in safetensors files, one tensor or file at a time, never all at once."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Size, Tensor

from lbr_ds.errors import CheckpointError, short

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
FILE_BYTES = 2 << 30  # a weights file is closed once it holds this much


class Stored:
    """The tensors in a folder's safetensors files, by name; each is read when needed.

    Raises CheckpointError for a file that is cut, damaged or missing.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file: dict[str, Path] = {}
        self._shape: dict[str, Size] = {}
        self._alias: dict[str, str] = {}
        for file in _weight_files(folder):
            with _opened(file) as opened:
                for name in opened.keys():  # noqa: SIM118
                    if name in self._file:
                        raise CheckpointError(
                            f"{folder}: {self._file[name].name} and {file.name} both hold tensor "
                            f"{name}; keep one of the files"
                        )
                    self._file[name] = file
                    self._shape[name] = Size(opened.get_slice(name).get_shape())
        for name, listed in _listed(folder).items():
            if self._file.get(name) != folder / listed:
                raise CheckpointError(
                    f"{folder / INDEX}: names tensor {name} in {listed}, which does not hold it; "
                    "copy the model again"
                )

    def __contains__(self, name: str) -> bool:
        return self._alias.get(name, name) in self._file

    def names(self) -> list[str]:
        """Return the names in the files."""
        return list(self._file)

    def rename(self, stored: Mapping[str, str]) -> None:
        """Also find tensors under other names: {name: name in the files}."""
        self._alias.update(stored)

    def add(self, other: Stored, names: Iterable[str]) -> None:
        """Take tensors of these names from another folder from now on."""
        for name in names:
            self._alias.pop(name, None)
            self._file[name], self._shape[name] = other._file[name], other.shape(name)

    def shape(self, name: str) -> Size:
        """Return the shape without reading the tensor."""
        return self._shape[self._alias.get(name, name)]

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype without reading the tensor."""
        name = self._alias.get(name, name)
        with _opened(self._file[name]) as opened:
            found: Tensor = (
                opened.get_slice(name)[:0] if self._shape[name] else opened.get_tensor(name)
            )
            return found.dtype

    def read(self, name: str) -> Tensor:
        """Read a tensor, on the CPU."""
        name = self._alias.get(name, name)
        with _opened(self._file[name]) as opened:
            found: Tensor = opened.get_tensor(name)
            return found


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, "pt") as opened:
            yield opened
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{file}: cannot be read as safetensors ({short(error)}); check that the file can be "
            "opened, and copy the model again if it is truncated or damaged"
        ) from None


def _weight_files(folder: Path) -> list[Path]:
    """Return the files that transformers would read; if it finds none, all there are."""
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if listed := _listed(folder):
        return [folder / name for name in sorted(set(listed.values()))]
    return sorted(folder.glob("*.safetensors"))


def _listed(folder: Path) -> dict[str, str]:
    """Return {tensor: file} of the index; {} if there is no index, or one file has all."""
    index = folder / INDEX
    if not index.is_file() or (folder / SINGLE).is_file():
        return {}
    try:
        listed = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = {str(name): str(file) for name, file in listed.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{index}: not an index of weights ({type(error).__name__}); copy the model again"
        ) from None
    for file in set(files.values()):
        if Path(file).name != file or not (folder / file).is_file():
            raise CheckpointError(f"{index}: names {file}, which is missing; copy the model again")
    return files


def in_files(sizes: Mapping[str, int]) -> dict[str, list[str]]:
    """Return {file: its tensors} for tensors of these bytes; one file if they are few."""
    groups: list[list[str]] = [[]]
    held = 0
    for name, size in sizes.items():
        if held > FILE_BYTES:
            groups.append([])
            held = 0
        groups[-1].append(name)
        held += size
    if len(groups) == 1:
        return {SINGLE: groups[0]}
    return {f"model-{i:05d}.safetensors": names for i, names in enumerate(groups, start=1)}


def share_of(files: Mapping[str, list[str]], rank: int, world: int) -> dict[str, list[str]]:
    """Return the files that one of `world` ranks writes, spread over the ranks."""
    return {f: files[f] for i, f in enumerate(files) if i * world // len(files) == rank}


def save_files(
    files: Mapping[str, Iterable[str]], read: Callable[[str], Tensor], folder: Path
) -> None:
    """Write `files` into `folder`; read(name) returns a tensor; one file is in memory at a time."""
    folder.mkdir(parents=True, exist_ok=True)
    for file, names in files.items():
        held = {name: read(name).contiguous() for name in names}
        save_file(held, folder / file, metadata={"format": "pt"})


def save_index(files: Mapping[str, list[str]], folder: Path) -> None:
    """Write which of several files has which tensor, in the format of `from_pretrained`."""
    if len(files) > 1:
        where = {name: file for file, names in files.items() for name in names}
        index = {"metadata": {}, "weight_map": where}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
