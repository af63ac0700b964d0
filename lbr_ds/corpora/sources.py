"""Find the format, the shape and the file of each source of a recipe."""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from lbr_ds.config import SourceConfig
from lbr_ds.corpora.formats import FORMATS
from lbr_ds.corpora.formats.beir import is_msmarco
from lbr_ds.corpora.formats.documents import documents
from lbr_ds.corpora.formats.lines import check_file
from lbr_ds.corpora.formats.peers import PEERS
from lbr_ds.corpora.formats.recognise import Form, recognise, shape_of, unpack
from lbr_ds.corpora.formats.shapes import Outcome, read_records, source_name
from lbr_ds.errors import ConfigError, DataError
from lbr_ds.system.locate import file_sha256, locate
from lbr_ds.system.masking import mask_secrets

_SUFFIXES = {suffix: name for name, kind in FORMATS.items() for suffix in kind.suffixes}


@dataclass(frozen=True)
class Corpus:
    """A source of the recipe that was found, with all defaults filled in."""

    source: SourceConfig
    path: Path
    format: str
    shape: str  # empty: recognised from the first rows
    key: str = "data.sources.0"  # its place in the recipe, for messages

    @cached_property
    def form(self) -> Form:
        """What its rows are.

        Raises:
            DataError: The recipe does not say it, and no known shape fits the first rows.
        """
        kind, place = FORMATS[self.format], self.path.name
        rows = kind.read(self.path, self.source)
        if not self.shape:
            return recognise(rows, self.source, place, self.key, self.format == "tsv")
        needed = self.format == "jsonl" or self.shape in PEERS
        return unpack(rows if needed else (), self.source, self.shape)

    @property
    def name(self) -> str:
        """The `source` of its records."""
        return source_name(self.source, self.path)

    @property
    def keep_lines(self) -> bool:
        """Whether line ends and indentation carry meaning."""
        if self.source.keep_lines is not None:
            return self.source.keep_lines
        return FORMATS[self.format].keep_lines

    def read(self) -> Iterator[Outcome]:
        """Yield its records in file order, see `read_records`."""
        source = self.source
        if self.form.header:
            source = source.model_copy(update={"header": list(self.form.header)})
        with ExitStack() as stack:
            lookup = None
            if source.documents:
                texts = _documents(source)
                rows = FORMATS[texts.format].read(texts.path, texts.source)
                lookup = stack.enter_context(documents(rows, source.documents))
            rows = self.form.unpacked(FORMATS[self.format].read(self.path, source))
            yield from read_records(rows, self.name, source, self.form.shape, lookup)

    def provenance(self) -> dict[str, Any]:
        """Return what identifies the source: its path in the recipe, size and sha256."""
        size, sha256 = _identity(self)
        made = {
            "name": self.name,
            "path": mask_secrets(self.source.path),
            "format": self.format,
            "license": self.source.license,
            "origin": self.source.origin,
            "bytes": size,
            "sha256": sha256,
        }
        if self.source.documents:
            bytes_, hashed = _identity(_documents(self.source))
            place = mask_secrets(self.source.documents)
            made["documents"] = {"path": place, "bytes": bytes_, "sha256": hashed}
        return made


def _documents(source: SourceConfig) -> Corpus:
    """Return the documents that a source names by id; they are read with its encoding."""
    text = SourceConfig(path=source.documents, shape="passages")
    found = find(text)
    if not FORMATS[found.format].is_text:
        return found
    return replace(found, source=text.model_copy(update={"encoding": source.encoding}))


def _identity(corpus: Corpus) -> tuple[int, str]:
    """Return size and sha256 of the files of a corpus; nothing of a data set of the hub."""
    return (0, "") if corpus.format == "hub" else _fingerprint(corpus.path, corpus.format)


def check(source: SourceConfig) -> None:
    """Check a source before anything is fetched.

    Raises:
        ConfigError: The recipe names an unknown format.
    """
    if source.format and source.format not in FORMATS:
        near = difflib.get_close_matches(source.format, FORMATS, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(FORMATS)}"
        raise ConfigError(f"data.sources.format: unknown format {source.format!r}; {hint}")


def find(source: SourceConfig, key: str = "data.sources.0") -> Corpus:
    """Return the corpus of a source; fetches it if it is remote.

    Args:
        source: The source in the recipe.
        key: Its place in the recipe, for messages.

    Raises:
        DataError: There is no such file.
        ConfigError: The format cannot be determined, or a key does not apply to it.
        EnvironmentProblem: The source cannot be fetched.
    """
    hub = source.path.startswith("hf:")
    path = Path(source.path) if hub else locate(source.path)
    if not hub:
        check_file(path)
    name = source.format or ("hub" if hub else _format_of(path, source))
    kind = FORMATS[name]
    if path.is_dir() and kind.only_files:
        raise DataError(f"{path}: data.sources.path must be a file for format {name}")
    if not kind.is_text and source.encoding != "utf-8":
        text_formats = ", ".join(other for other in FORMATS if FORMATS[other].is_text)
        raise ConfigError(
            f"data.sources.encoding={source.encoding}: format {name} has its own; remove the key "
            f"(it is for {text_formats})"
        )
    columns = source.columns.model_dump(exclude_defaults=True)
    merged = kind.columns.model_copy(update=columns)
    shape = source.shape or kind.shape or shape_of(merged)
    if not source.shape and shape == "records" and columns:
        shape = "pairs"
    return Corpus(source.model_copy(update={"columns": merged}), path, name, shape, key)


def _format_of(path: Path, source: SourceConfig) -> str:
    """Return the format by suffix; JSON lines for an unknown one."""
    if source.path.startswith("python:"):
        return "python"
    if path.is_dir():
        if (path / "qrels").is_dir() or is_msmarco(path):
            return "beir"
        names = sorted({_SUFFIXES[p.suffix] for p in path.rglob("*") if p.suffix in _SUFFIXES})
        if len(names) > 1:
            raise ConfigError(
                f"data.sources.format: {path} holds files of {', '.join(names)}; name the format"
            )
        return names[0] if names else "jsonl"
    return _SUFFIXES.get(Path(path.name.removesuffix(".gz")).suffix, "jsonl")


def _fingerprint(path: Path, name: str) -> tuple[int, str]:
    """Return size and sha256: of a folder, over the names and hashes of the files that are read."""
    if path.is_file():
        return path.stat().st_size, file_sha256(path)
    size, digest = 0, hashlib.sha256()
    for inside, sha256, length in _hashes_below(path, name):
        size += length
        digest.update(f"{inside}\0{sha256}\0".encode())
    return size, digest.hexdigest()


def _hashes_below(folder: Path, name: str) -> Iterator[tuple[str, str, int]]:
    if (files := FORMATS[name].files) is not None:
        for inside, raw in files(folder):
            yield inside, hashlib.sha256(raw).hexdigest(), len(raw)
        return
    for file in sorted(p for p in folder.rglob("*") if p.is_file()):
        yield file.relative_to(folder).as_posix(), file_sha256(file), file.stat().st_size
