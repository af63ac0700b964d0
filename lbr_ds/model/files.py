"""A model's weights in safetensors files, a tensor or a file at a time: never the whole at once."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Size, Tensor

FILE_BYTES = 2 << 30  # a weights file is closed once it holds this much


class Stored:
    """The tensors in a folder's safetensors files, by name; each is read when it is asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file: dict[str, Path] = {}
        self._shape: dict[str, Size] = {}
        for file in sorted(folder.glob("*.safetensors")):
            with safe_open(file, "pt") as opened:
                for name in opened.keys():  # noqa: SIM118
                    self._file[name] = file
                    self._shape[name] = Size(opened.get_slice(name).get_shape())

    def __contains__(self, name: str) -> bool:
        return name in self._file

    def shape(self, name: str) -> Size:
        """Without reading it."""
        return self._shape[name]

    def read(self, name: str) -> Tensor:
        """The tensor, on the CPU."""
        with safe_open(self._file[name], "pt") as opened:
            found: Tensor = opened.get_tensor(name)
            return found


def in_files(sizes: Mapping[str, int]) -> dict[str, list[str]]:
    """File: the tensors that it gets, for tensors of these bytes; one file if they are few."""
    groups: list[list[str]] = [[]]
    held = 0
    for name, size in sizes.items():
        if held > FILE_BYTES:
            groups.append([])
            held = 0
        groups[-1].append(name)
        held += size
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {f"model-{i:05d}.safetensors": names for i, names in enumerate(groups, start=1)}


def share_of(files: Mapping[str, list[str]], rank: int, world: int) -> dict[str, list[str]]:
    """The files that one of `world` ranks writes: fewer files than ranks lie far apart."""
    return {f: files[f] for i, f in enumerate(files) if i * world // len(files) == rank}


def save_files(
    files: Mapping[str, Iterable[str]], read: Callable[[str], Tensor], folder: Path
) -> None:
    """Write `files` into `folder`; read(name) gives a tensor, asked for a file at a time."""
    folder.mkdir(parents=True, exist_ok=True)
    for file, names in files.items():
        held = {name: read(name).contiguous() for name in names}
        save_file(held, folder / file, metadata={"format": "pt"})


def save_index(files: Mapping[str, list[str]], folder: Path) -> None:
    """Which of several files has which tensor, as `from_pretrained` wants to be told."""
    if len(files) > 1:
        where = {name: file for file, names in files.items() for name in names}
        index = {"metadata": {}, "weight_map": where}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
