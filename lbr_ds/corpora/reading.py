"""Read and clean the sources in many processes, and write the records as parts.

A source with several pieces is read by the processes that clean it; a part is then one piece. Any
other source is read by one process and cleaned by all of them. With an engine that distributes the
work over nodes, the pieces of all sources are one phase.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain, groupby, islice
from pathlib import Path
from typing import NamedTuple

from lbr_ds.corpora.curate.cleaning import Rules, clean_record
from lbr_ds.corpora.formats.interface import Piece, Skipped
from lbr_ds.corpora.formats.shapes import Outcome
from lbr_ds.corpora.parts import Part, PartWriter, part_name
from lbr_ds.corpora.sources import Corpus
from lbr_ds.errors import DataError
from lbr_ds.records import Record
from lbr_ds.system.locate import refetch_hint
from lbr_ds.system.process_pool import is_spread, map_in_order

READ = "read"  # the phase of an engine
_ROWS, _CHARS = 2048, 1 << 22  # of one part, if the source is not read in pieces
_ALONE = 2  # of such parts, before other processes are started


class Source(NamedTuple):
    """A source and the rules for its rows."""

    corpus: Corpus
    rules: Rules
    signed: bool  # whether MinHash signatures are needed

    @property
    def role(self) -> str:
        """Its role in the recipe."""
        return self.corpus.source.role


class Job(NamedTuple):
    """A part that is to be made.

    Attributes:
        number: Of the source.
        name: Of the part.
        source: The source.
        folder: Where parts are written.
        piece: The piece to read; None: the rows are given.
        rows: The rows.
    """

    number: int
    name: str
    source: Source
    folder: Path
    piece: Piece | None
    rows: list[Outcome]


def made(
    every: list[Source], complete: set[int], written: list[list[Part]], folder: Path
) -> Iterator[tuple[int, Iterator[Part]]]:
    """Write the parts that are missing; yield the number of each source that misses some, and them.

    Args:
        every: The sources.
        complete: The numbers of the sources whose parts are all written.
        written: Of each source the parts that are written, in order.
        folder: Where parts are written.
    """
    if is_spread():
        jobs = (
            Job(number, part_name(number, piece.number, True), source, folder, piece, [])
            for number, source in enumerate(every)
            for piece in source.corpus.shared_pieces()
        )
        parts = map_in_order(_make, jobs, phase=READ)
        for number, own in groupby(parts, key=lambda part: part.number):
            if number not in complete:
                yield number, islice(own, len(written[number]), None)
        return
    for number, source in enumerate(every):
        if number not in complete:
            yield number, _of_source(number, source, written[number], folder)


def _of_source(number: int, source: Source, written: list[Part], folder: Path) -> Iterator[Part]:
    """Write the parts of a source that are missing, in this process and others of this machine."""
    last = written[-1].piece if written else None
    pieces = source.corpus.pieces(last, data=True)
    start = list(islice(pieces, 2))
    if last or len(start) > 1:
        later = islice(chain(start, pieces), 1 if last else 0, None)
        jobs = (
            Job(number, part_name(number, piece.number, False), source, folder, piece, [])
            for piece in later
        )
        return map_in_order(_make, jobs, alone=0)
    rows = chain.from_iterable(map(source.corpus.read, start))
    missing = islice(rows, sum(part.rows for part in written), None)
    jobs = (
        Job(number, part_name(number, place, False), source, folder, None, chunk)
        for place, chunk in enumerate(_chunks(missing), len(written))
    )
    return map_in_order(_make, jobs, alone=_ALONE)


def _make(job: Job) -> Part:
    """Clean the rows of a part, sign their texts, and write it; runs in any process of any node."""
    source = job.source
    records, faults = 0, []
    with (
        hinting(source.corpus),
        PartWriter(job.folder, job.name, source.role, source.signed) as part,
    ):
        for place, outcome in source.corpus.read(job.piece) if job.piece else job.rows:
            if isinstance(outcome, Record):
                records += 1
                part.add(place, clean_record(outcome, source.rules))
            elif isinstance(outcome, Skipped):
                part.add_fault(place, outcome.rule, outcome.example)
            else:
                faults.append(str(outcome))
                part.add_fault(place, "bad_record", str(outcome))
    piece = job.piece._replace(data=b"") if job.piece else None
    first = faults[0] if faults else ""
    return Part(job.number, job.name, piece, len(part), records, len(faults), first)


@contextmanager
def hinting(corpus: Corpus) -> Iterator[None]:
    """Add to an error of a source that was fetched how to fetch it again."""
    try:
        yield
    except DataError as error:
        hint = refetch_hint(corpus.path)
        raise DataError(f"{str(error).removesuffix(hint)}{hint}") from None


def _chunks(outcomes: Iterator[Outcome]) -> Iterator[list[Outcome]]:
    chunk: list[Outcome] = []
    chars = 0
    for where, entry in outcomes:
        chunk.append((where, entry))
        if isinstance(entry, Record):
            chars += sum(map(len, entry.texts()))
        if len(chunk) >= _ROWS or chars >= _CHARS:
            yield chunk
            chunk, chars = [], 0
    if chunk:
        yield chunk
