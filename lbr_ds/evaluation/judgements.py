"""Held-out records as queries, documents and relevance judgements.

1. Queries: one per record, with its instruction.
2. Documents: every positive and negative of every record, and plain passages of the split. A text
   that occurs twice is one document; instructions do not make texts differ, and a document has that
   of the first record that holds it. Under protocol knowledge (`corpora/curate/knowledge.py`) the
   tasks eval and control share the documents, which include the answers of cl.
3. Relevant: the record's own positives, and those of records of its group with the same query (a
   chemical with three uses is three records with one query: each use is relevant for all three).

This module does not import mteb, because training evaluates by the same definition.
"""

from __future__ import annotations

import json
import random
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lbr_ds.config import CONTROL
from lbr_ds.errors import DataError
from lbr_ds.instructions import bare
from lbr_ds.records import Record
from lbr_ds.system.urls import CACHE_GIB, is_url, public_url

if TYPE_CHECKING:
    from lbr_ds.shards import Manifest


@dataclass
class Judgements:
    """Texts with ids, and which document is relevant for which query.

    Texts are `Instructed`, as a model trained on the data encodes them; `bare` gives the texts for
    any other model.

    Attributes:
        queries: {query id: text}.
        documents: {document id: text}.
        relevant: {query id: {document id: 1}}.
        mates: {query id: {document id: 1}} of the documents of the query's whole group: the answer
            to another question of the group is neither relevant nor irrelevant.
    """

    queries: dict[str, str] = field(default_factory=dict)
    documents: dict[str, str] = field(default_factory=dict)
    relevant: dict[str, dict[str, int]] = field(default_factory=dict)
    mates: dict[str, dict[str, int]] = field(default_factory=dict)

    @classmethod
    def of(cls, records: Iterable[Record], others: Iterable[str] = ()) -> Judgements:
        """Return the judgements of `records`, in their order.

        Args:
            records: Records with queries.
            others: Further documents, which are relevant for none of them.
        """
        judged = cls()
        document_ids: dict[str, str] = {}
        answers: dict[Any, dict[str, int]] = defaultdict(dict)
        groups: dict[str, dict[str, int]] = defaultdict(dict)

        def document(text: str) -> str:
            key = " ".join(bare(text).split())
            number = document_ids.setdefault(key, f"d{len(document_ids)}")
            judged.documents.setdefault(number, text)
            return number

        for record in records:
            passages = (*record.positives, *record.negatives)
            numbers = [document(record.instructed_passage(text)) for text in passages]
            query_id = record.id if record.id not in judged.queries else _next(record, judged)
            judged.queries[query_id] = record.instructed_query()
            # All records with one question share this dict, so later positives reach them, too.
            judged.relevant[query_id] = answers[_question(record, query_id)]
            group = groups[record.group] if record.group else judged.relevant[query_id]
            judged.mates[query_id] = group
            for number in numbers[: len(record.positives)]:
                judged.relevant[query_id][number] = group[number] = 1
        for text in others:
            document(text)
        return judged

    def select(self, query_ids: Iterable[str]) -> Judgements:
        """Return the judgements of these queries; the documents stay."""
        kept = list(query_ids)
        queries = {i: self.queries[i] for i in kept}
        relevant, mates = ({i: part[i] for i in kept} for part in (self.relevant, self.mates))
        return Judgements(queries, self.documents, relevant, mates)

    def sample(self, count: int, seed: int) -> list[str]:
        """Return `count` query ids drawn by `seed`, in the order of the data."""
        ids = list(self.queries)
        if count >= len(ids):
            return ids
        chosen = set(random.Random(seed).sample(ids, count))
        return [i for i in ids if i in chosen]

    def limit_documents(self, count: int, seed: int) -> Judgements:
        """Return the same queries with at most `count` documents: the relevant ones, others drawn.

        There are more than `count` only if more documents are relevant.
        """
        if count >= len(self.documents):
            return self
        kept = {i for own in self.relevant.values() for i in own}
        others = [i for i in self.documents if i not in kept]
        kept.update(random.Random(seed).sample(others, max(0, count - len(kept))))
        documents = {i: text for i, text in self.documents.items() if i in kept}
        mates = {q: {i: 1 for i in own if i in kept} for q, own in self.mates.items()}
        return Judgements(self.queries, documents, self.relevant, mates)

    def document_indices(self) -> tuple[list[list[int]], list[list[int]]]:
        """Return for each query the indices in `documents` of the relevant ones and of `mates`."""
        place = {document: n for n, document in enumerate(self.documents)}
        own, mates = (
            [[place[i] for i in part[query]] for query in self.queries]
            for part in (self.relevant, self.mates)
        )
        return own, mates


@dataclass(frozen=True)
class HeldOut:
    """A held-out split of prepared data.

    Attributes:
        split: Its name.
        judged: Its judgements.
        records: The record of each query, in order.
        facts_in: See `HeldOutTask`.
        languages: `data.languages` of the recipe that the data was prepared with; () if
            curation.json does not say.
    """

    split: str
    judged: Judgements
    records: list[Record]
    facts_in: str = ""
    languages: tuple[str, ...] = ()


def manifest_of(data: Path | str) -> Manifest:
    """Return the manifest of prepared data, a folder or its URL. Raises DataError without one."""
    from lbr_ds.shards import Manifest

    if not is_url(data) and not Path(data).is_dir():
        place = public_url(data)
        raise DataError(f"{place}: no such data folder; make it with `lbr-ds prepare RECIPE`")
    return Manifest.load(data)


def read_held_out(data: Path | str, cache_gib: float = CACHE_GIB) -> list[HeldOut]:
    """Read the `eval` split of prepared data, and under protocol knowledge `control`.

    Both have the same documents.

    Args:
        data: A prepared folder or its URL.
        cache_gib: See `Manifest.load`.

    Raises:
        DataError: A split is missing or has no query.
    """
    from lbr_ds.shards import read_split

    place, manifest = public_url(data), manifest_of(data)
    knowledge = manifest.protocol == "knowledge"
    held_out = {
        name: list(read_split(data, name, cache_gib=cache_gib))
        for name in (("eval", CONTROL) if knowledge else ("eval",))
    }
    asked = {name: [r for r in records if r.query] for name, records in held_out.items()}
    for name, records in asked.items():
        if not records:
            raise DataError(
                f"{place}: the {name} split holds no query; raise data.splits.{name}, or add a "
                "source of questions with role eval to a corpus of passages"
            )
    trained = read_split(data, "cl", cache_gib=cache_gib) if knowledge else ()
    answers = (record.instructed_passage(text) for record in trained for text in record.positives)
    passages = (r.instructed_passage(r.text) for r in chain(*held_out.values()) if r.text)
    judged = Judgements.of(chain(*asked.values()), chain(answers, passages))
    languages = _languages(manifest.beside("curation.json"))
    ids = iter(judged.queries)
    return [
        HeldOut(
            name,
            judged.select(islice(ids, len(records))),
            records,
            manifest.prepared if knowledge and name == "eval" else "",
            languages,
        )
        for name, records in asked.items()
    ]


def _languages(curation: bytes | None) -> tuple[str, ...]:
    """Return `data.languages` as curation.json has them; () if it is missing or damaged."""
    try:
        return tuple(map(str, json.loads(curation)["languages"])) if curation else ()
    except (ValueError, KeyError, TypeError):
        return ()  # the manifest decides what the data is; this file only explains it


def _next(record: Record, judged: Judgements) -> str:
    """Return an id for a record whose id another corpus uses, too."""
    number = 2
    while f"{record.id}#{number}" in judged.queries:
        number += 1
    return f"{record.id}#{number}"


def _question(record: Record, query_id: str) -> Any:
    """Return a key that is equal for records of one group with the same query."""
    if not record.group:
        return query_id
    return record.group, record.instruction, " ".join(record.query.casefold().split())
