"""A source as the recipe names it -> its format, its shape, its file, and its records."""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lbr_ds.config import ColumnsConfig, SourceConfig
from lbr_ds.corpora import FORMATS
from lbr_ds.corpora.formats.lines import check_file
from lbr_ds.corpora.formats.python_functions import source_files
from lbr_ds.corpora.formats.rows import Found, source_name
from lbr_ds.corpora.formats.shapes import read_records
from lbr_ds.errors import ConfigError, DataError
from lbr_ds.system.locate import file_sha256, locate
from lbr_ds.system.masking import mask_secrets

_SUFFIXES = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".txt": "text",
    ".md": "text",
    ".py": "python",
    ".whl": "python",
    ".obo": "obo",
}
_TEXT = ("jsonl", "csv", "tsv", "text", "beir", "obo")
_ROWS_ARE_RECORDS = ("jsonl", "beir", "icd10cm")
_COLUMNS = {
    "python": ColumnsConfig(query="docstring", positives="code"),
    "obo": ColumnsConfig(query="synonym", positives="definition", group="id"),
    "text": ColumnsConfig(text="text", group="file"),
}


@dataclass(frozen=True)
class Corpus:
    """One source of the recipe, found: everything left to defaults decided."""

    source: SourceConfig
    path: Path
    format: str
    shape: str

    @property
    def name(self) -> str:
        """What its records have as `source`."""
        return source_name(self.source, self.path)

    @property
    def keep_lines(self) -> bool:
        """Whether line ends and indentation carry meaning."""
        kept = self.source.keep_lines
        return self.format == "python" if kept is None else kept

    def read(self) -> Iterator[Found]:
        """Its records in file order."""
        return read_records(FORMATS[self.format], self.path, self.source, self.shape)

    def provenance(self) -> dict[str, Any]:
        """What the source is: as the recipe names it, with the size and hash of its files."""
        size, sha256 = (0, "") if self.format == "hub" else _fingerprint(self.path, self.format)
        return {
            "name": self.name,
            "path": mask_secrets(self.source.path),
            "format": self.format,
            "license": self.source.license,
            "origin": self.source.origin,
            "bytes": size,
            "sha256": sha256,
        }


def check(source: SourceConfig) -> None:
    """Raise ConfigError for a format that is none; before anything is fetched."""
    if source.format and source.format not in FORMATS:
        near = difflib.get_close_matches(source.format, FORMATS, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(FORMATS)}"
        raise ConfigError(f"data.sources.format: unknown format {source.format!r}; {hint}")


def find(source: SourceConfig) -> Corpus:
    """The corpus that `source` names, fetched where it has to be.

    Raises DataError for a path that is not there, and whatever `locate` raises.
    """
    hub = source.path.startswith("hf:")
    path = Path(source.path) if hub else locate(source.path)
    if not hub:
        check_file(path)
    kind = source.format or ("hub" if hub else _format_of(path, source))
    if path.is_dir() and kind in ("icd10cm", "obo"):
        raise DataError(f"{path}: data.sources.path must be a file for format {kind}")
    if kind not in _TEXT and source.encoding != "utf-8":
        raise ConfigError(
            f"data.sources.encoding={source.encoding}: format {kind} has its own; leave it out "
            f"(it is for {', '.join(_TEXT)})"
        )
    columns = source.columns.model_dump(exclude_defaults=True)
    merged = _COLUMNS.get(kind, ColumnsConfig()).model_copy(update=columns)
    shape = source.shape
    if not shape and kind == "text":
        shape = "passages"
    elif not shape:
        shape = "records" if kind in _ROWS_ARE_RECORDS and not columns else "pairs"
    return Corpus(source.model_copy(update={"columns": merged}), path, kind, shape)


def _format_of(path: Path, source: SourceConfig) -> str:
    """Told by the suffix; JSON lines where that says nothing."""
    if source.path.startswith("python:"):
        return "python"
    if path.is_dir():
        if (path / "qrels").is_dir():
            return "beir"
        inside = sorted({p.suffix for p in path.rglob("*") if p.suffix in _SUFFIXES})
        kinds = sorted({_SUFFIXES[suffix] for suffix in inside})
        if len(kinds) > 1:
            raise ConfigError(
                f"data.sources.format: {path} holds files of {', '.join(kinds)}; name the format"
            )
        return kinds[0] if kinds else "jsonl"
    return _SUFFIXES.get(Path(path.name.removesuffix(".gz")).suffix, "jsonl")


def _fingerprint(path: Path, kind: str) -> tuple[int, str]:
    """Size and sha256 of a file; of a folder, over the names and hashes of what is read of it."""
    if path.is_file():
        return path.stat().st_size, file_sha256(path)
    size, digest = 0, hashlib.sha256()
    for inside, sha256, length in _python(path) if kind == "python" else _all(path):
        size += length
        digest.update(f"{inside}\0{sha256}\0".encode())
    return size, digest.hexdigest()


def _python(path: Path) -> Iterator[tuple[str, str, int]]:
    for inside, raw in source_files(path):
        yield inside, hashlib.sha256(raw).hexdigest(), len(raw)


def _all(path: Path) -> Iterator[tuple[str, str, int]]:
    for file in sorted(p for p in path.rglob("*") if p.is_file()):
        yield file.relative_to(path).as_posix(), file_sha256(file), file.stat().st_size
