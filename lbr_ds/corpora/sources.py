"""Find the format, the shape and the file of each source of a recipe."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from lbr_ds.config import SourceConfig
from lbr_ds.corpora.formats import FORMATS
from lbr_ds.corpora.formats.beir import is_msmarco
from lbr_ds.corpora.formats.columnar import hub_files, is_hub
from lbr_ds.corpora.formats.documents import documents
from lbr_ds.corpora.formats.interface import Parts, Piece, Place, files_of, size_of
from lbr_ds.corpora.formats.kinds import check_file
from lbr_ds.corpora.formats.peers import PEERS
from lbr_ds.corpora.formats.recognise import Form, recognise, shape_of, unpack
from lbr_ds.corpora.formats.shapes import Outcome, read_records, source_name
from lbr_ds.errors import ConfigError, DataError
from lbr_ds.system.locate import downloaded, file_sha256, locate
from lbr_ds.system.masking import mask_secrets
from lbr_ds.system.remote_files import RemoteFiles, http_file, list_files
from lbr_ds.system.urls import is_url

WHOLE_BYTES = 64 << 20  # a file over HTTP up to this size is downloaded
# So many files, none larger, are pieces of several nodes as they are.
MANY_FILES, UNCUT_BYTES = 64, 128 << 20
_SUFFIXES = {suffix: name for name, kind in FORMATS.items() for suffix in kind.suffixes}


@dataclass(frozen=True)
class Corpus:
    """A source of the recipe that was found, with all defaults filled in."""

    source: SourceConfig
    path: Place
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
        rows = (kind.parts.first_rows if kind.parts else kind.read)(self.path, self.source)
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

    @property
    def parts(self) -> Parts | None:
        """How to read its format in pieces; None: it is read by one process, from its start.

        So is a source with `max_records`, as the rows before a piece decide whether it is read, and
        one with `documents`, which are collected before the first row is read.
        """
        whole = self.source.max_records or self.source.documents
        return None if whole else FORMATS[self.format].parts

    @property
    def size(self) -> int:
        """The length of the files that are read in pieces, in bytes; about the sum of theirs."""
        if self.parts is None:
            return 0
        return sum(map(size_of, files_of(self.path, self.parts.suffixes)))

    def pieces(self, first: Piece | None = None, data: bool = False) -> Iterator[Piece]:
        """Yield its pieces in the order of reading; each is found when it is asked for.

        Args:
            first: The piece to begin with, which an earlier call yielded.
            data: Whether pieces of remote JSON lines hold their bytes, which are fetched in any
                case to count the lines; without, `read` fetches them again.

        Raises:
            DataError: The file cannot be read.
        """
        cut = self.parts.cut(self.path, self.source, first) if self.parts else [Piece()]
        for number, piece in enumerate(cut, first.number if first else 0):
            yield piece._replace(number=number, data=piece.data if data else b"")

    def shared_pieces(self) -> Iterator[Piece]:
        """Yield its pieces for several nodes.

        Of many files each is a piece. To cut JSON lines at line ends, this process alone would have
        to read, or fetch, all of them first.
        """
        if self.parts and self.parts.whole:
            files = [file for file in files_of(self.path, self.parts.suffixes) if size_of(file)]
            if len(files) >= MANY_FILES and max(map(size_of, files)) <= UNCUT_BYTES:
                return (Piece.of(file)._replace(number=n) for n, file in enumerate(files))
        return self.pieces()

    def read(self, piece: Piece | None = None) -> Iterator[Outcome]:
        """Yield the records of a piece, or of all pieces in order; see `read_records`."""
        if piece is None:
            for one in self.pieces(data=True):
                yield from self.read(one)
            return
        source = self.source
        if self.form.header:
            source = source.model_copy(update={"header": list(self.form.header)})
        with ExitStack() as stack:
            lookup = None
            if source.documents:
                texts = _documents(source)
                rows = FORMATS[texts.format].read(texts.path, texts.source)
                lookup = stack.enter_context(documents(rows, source.documents))
            rows = (
                self.parts.read(self.path, source, piece)
                if self.parts
                else FORMATS[self.format].read(self.path, source)
            )
            outcomes = read_records(
                self.form.unpacked(rows), self.name, source, self.form.shape, lookup, piece.number
            )
            yield from islice(outcomes, source.max_records)

    def check_unchanged(self) -> None:
        """Raise EnvironmentProblem if a remote file has changed since it was found."""
        if isinstance(self.path, RemoteFiles):
            self.path.check()

    def provenance(self) -> dict[str, Any]:
        """Return what identifies the source: its path in the recipe, size and sha256.

        Of files that are not downloaded it is the sha256 of their names, sizes and versions.
        """
        size, sha256 = _identity(self)
        made: dict[str, Any] = {
            "name": self.name,
            "path": mask_secrets(self.source.path),
            "format": self.format,
            "license": self.source.license,
            "origin": self.source.origin,
            "bytes": size,
            "sha256": sha256,
        }
        if isinstance(self.path, RemoteFiles):
            made["streamed"] = len(self.path.listed)
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
    """Return size and sha256 of the files of a corpus; nothing of what `datasets` reads."""
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
    path: Place
    if is_hub(source):
        path = hub_files(source) or Path(source.path)
    else:
        path = _streamed(source) or locate(source.path)
        if isinstance(path, Path):
            check_file(path)
    by_datasets = is_hub(source) and isinstance(path, Path)
    name = source.format or ("hub" if by_datasets else _format_of(path, source))
    kind = FORMATS[name]
    if isinstance(path, RemoteFiles) and not (kind.parts and kind.parts.remote):
        raise ConfigError(
            f"data.sources.path={path}: format {name} cannot be read from this address; download "
            "the files"
        )
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


def _streamed(source: SourceConfig) -> RemoteFiles | None:
    """Return the files of a source that is read where it is; None for any other.

    Over HTTP these are patterns, and JSON lines and Parquet above WHOLE_BYTES, unless the address
    has a hash, the file was downloaded before, or the server does not send ranges.
    """
    place = source.path
    if not is_url(place):
        return None
    if not place.startswith(("http://", "https://")) or "{" in place:
        return list_files(place)
    name = PurePosixPath(urlsplit(place).path.removesuffix(".gz"))
    kind = FORMATS[source.format or _SUFFIXES.get(name.suffix, "jsonl")]
    if "#" in place or not (kind.parts and kind.parts.remote) or downloaded(place).exists():
        return None
    file = http_file(place)
    if file is None or file.size <= WHOLE_BYTES:
        return None
    return RemoteFiles(place, file.name, False, (file,))


def _format_of(path: Place, source: SourceConfig) -> str:
    """Return the format by suffix; JSON lines for an unknown one."""
    if isinstance(path, RemoteFiles):
        suffixes = {PurePosixPath(file.name.removesuffix(".gz")).suffix for file in path.listed}
        found = sorted({_SUFFIXES[one] for one in suffixes if one in _SUFFIXES})
        return _only(found, path)
    if source.path.startswith("python:"):
        return "python"
    if path.is_dir():
        if (path / "qrels").is_dir() or is_msmarco(path):
            return "beir"
        names = sorted({_SUFFIXES[p.suffix] for p in path.rglob("*") if p.suffix in _SUFFIXES})
        return _only(names, path)
    return _SUFFIXES.get(Path(path.name.removesuffix(".gz")).suffix, "jsonl")


def _only(names: list[str], path: Place) -> str:
    """Return the only format of the files in a folder; JSON lines if none is known."""
    if len(names) > 1:
        raise ConfigError(
            f"data.sources.format: {path} holds files of {', '.join(names)}; name the format"
        )
    return names[0] if names else "jsonl"


def _fingerprint(path: Place, name: str) -> tuple[int, str]:
    """Return size and sha256: of a folder, over the names and hashes of the files that are read."""
    if isinstance(path, RemoteFiles):
        plain = [(file.name, file.size, file.version) for file in path.listed]
        digest = hashlib.sha256(json.dumps(plain).encode())
        return sum(file.size for file in path.listed), digest.hexdigest()
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
