"""Held-out records -> an mteb retrieval task; names -> official mteb tasks.

1. Queries: one per record, `{instruction}{query}`.
2. Corpus: every positive and negative of every record; a text that occurs twice is one document.
   Under protocol knowledge (`corpora/knowledge.py`) it is one for two tasks, eval and control, and
   has the answers of cl too.
3. Relevant: the record's own positives, and those of records of its group that ask the same thing
   (a chemical with three uses is three records with one query: each use is right for all three).
"""

from __future__ import annotations

import difflib
import random
import warnings
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

import mteb
from datasets import Dataset
from mteb.abstasks import AbsTaskRetrieval
from mteb.abstasks.abstask import AbsTask

from lbr_ds.address import is_url, shown
from lbr_ds.config import CONTROL
from lbr_ds.errors import ConfigError, DataError
from lbr_ds.records import Record

SPLIT = "test"


@dataclass
class Judgements:
    """Texts with ids, and which document answers which query.

    mates: for each query the documents of its whole group, its own among them: an answer to
    another question of the group is neither right nor wrong.
    """

    queries: dict[str, str] = field(default_factory=dict)
    documents: dict[str, str] = field(default_factory=dict)
    relevant: dict[str, dict[str, int]] = field(default_factory=dict)
    mates: dict[str, dict[str, int]] = field(default_factory=dict)

    @classmethod
    def of(cls, records: Iterable[Record], others: Iterable[str] = ()) -> Judgements:
        """Number the texts of `records` in the order in which they come; others: documents that
        answer none of them."""
        judged = cls()
        document_ids: dict[str, str] = {}
        answers: dict[Any, dict[str, int]] = defaultdict(dict)
        groups: dict[str, dict[str, int]] = defaultdict(dict)
        for record in records:
            for text in (*record.positives, *record.negatives):
                key = " ".join(text.split())
                if key not in document_ids:
                    document_ids[key] = f"d{len(document_ids)}"
                    judged.documents[document_ids[key]] = text
            query_id = record.id if record.id not in judged.queries else _next(record, judged)
            judged.queries[query_id] = record.instruction + record.query
            # The dict is shared by all records with one key, so later positives reach them too.
            judged.relevant[query_id] = answers[_question(record, query_id)]
            group = groups[record.group] if record.group else judged.relevant[query_id]
            judged.mates[query_id] = group
            for text in record.positives:
                number = document_ids[" ".join(text.split())]
                judged.relevant[query_id][number] = group[number] = 1
        for text in others:
            key = " ".join(text.split())
            if key not in document_ids:
                document_ids[key] = f"d{len(document_ids)}"
                judged.documents[document_ids[key]] = text
        return judged

    def choose(self, query_ids: Iterable[str]) -> Judgements:
        """The same documents, fewer queries."""
        kept = list(query_ids)
        queries = {i: self.queries[i] for i in kept}
        relevant, mates = ({i: part[i] for i in kept} for part in (self.relevant, self.mates))
        return Judgements(queries, self.documents, relevant, mates)

    def sample(self, count: int, seed: int) -> list[str]:
        """`count` query ids, the same ones for every model, in the order of the data."""
        ids = list(self.queries)
        if count >= len(ids):
            return ids
        chosen = set(random.Random(seed).sample(ids, count))
        return [i for i in ids if i in chosen]


def _next(record: Record, judged: Judgements) -> str:
    """An id for a record whose id another corpus uses too."""
    number = 2
    while f"{record.id}#{number}" in judged.queries:
        number += 1
    return f"{record.id}#{number}"


def _question(record: Record, query_id: str) -> Any:
    """Equal for records of one group that ask the same thing; a record without group is alone."""
    if not record.group:
        return query_id
    return record.group, record.instruction, " ".join(record.query.casefold().split())


class HeldOutTask(AbsTaskRetrieval):
    """An mteb retrieval task over `Judgements`, in memory; keeps each query's score and ranking.

    After a run: `per_query` {query id: ndcg@10}, `rankings` {query id: {document id: score}}.
    told_by: the fingerprint of the data whose gl states facts of what is asked, by its protocol.
    """

    k_values = (1, 3, 5, 10, 20, 100)

    def __init__(self, name: str, judged: Judgements, told_by: str = "") -> None:
        self.metadata = mteb.TaskMetadata(
            name=name,
            description="Held-out records of a domain corpus: find the passage that answers.",
            dataset={"path": "local", "revision": "local"},
            type="Retrieval",
            category="t2t",
            eval_splits=[SPLIT],
            eval_langs=["eng-Latn"],
            main_score="ndcg_at_10",
        )
        super().__init__()
        self.judged = judged
        self.told_by = told_by
        self.per_query: dict[str, float] = {}
        self.rankings: dict[str, dict[str, float]] = {}
        self.load_data()

    def load_data(self, *args: Any, **kwargs: Any) -> None:
        """Hand mteb the texts; no file and no network."""
        judged = self.judged
        queries = [{"id": i, "text": t} for i, t in judged.queries.items()]
        corpus = [{"id": i, "title": "", "text": t} for i, t in judged.documents.items()]
        self.dataset = {
            "default": {
                SPLIT: {
                    "queries": Dataset.from_list(queries),
                    "corpus": Dataset.from_list(corpus),
                    "relevant_docs": judged.relevant,
                    "top_ranked": None,
                }
            }
        }
        self.data_loaded = True

    def task_specific_scores(
        self,
        scores: dict[str, dict[str, float]],
        qrels: Any,
        results: dict[str, dict[str, float]],
        hf_split: str,
        hf_subset: str,
    ) -> dict[str, float]:
        """mteb's hook after scoring; the texts need not be encoded again for the report."""
        self.per_query = {i: round(s["ndcg_cut_10"], 5) for i, s in scores.items()}
        self.rankings = results
        return {}


def held_out_task(
    data: Path | str,
    *,
    max_queries: int | None = None,
    query_ids: Sequence[str] = (),
    seed: int = 0,
) -> HeldOutTask:
    """The task over the `eval` split of a prepared folder or its URL; against the whole corpus.

    max_queries: at most so many queries, drawn by `seed`; query_ids: exactly these instead.
    Raises DataError when the split is missing or empty, ConfigError for an unknown query id.
    """
    task = held_out_tasks(data, max_queries=None if query_ids else max_queries, seed=seed)[0]
    unknown = [i for i in query_ids if i not in task.judged.queries]
    if unknown:
        raise ConfigError(f"{shown(data)}: no eval record has the id {unknown[0]!r}")
    if not query_ids:
        return task
    return HeldOutTask(task.metadata.name, task.judged.choose(query_ids), task.told_by)


def held_out_tasks(
    data: Path | str, *, max_queries: int | None = None, seed: int = 0
) -> list[HeldOutTask]:
    """The tasks of a prepared folder or its URL: `NAME-eval`, and under protocol knowledge
    `NAME-control` over the same documents.

    max_queries: at most so many queries of each, drawn by `seed`. Raises DataError when a split is
    missing or holds no query.
    """
    from lbr_ds.shards import Manifest, read_split

    place = shown(data)
    if not is_url(data) and not Path(data).is_dir():
        raise DataError(f"{place}: no such data folder; make it with `lbr-ds prepare RECIPE`")
    manifest = Manifest.load(data)
    knowledge = manifest.protocol == "knowledge"
    asked = {
        name: [record for record in read_split(data, name) if record.query]
        for name in (("eval", CONTROL) if knowledge else ("eval",))
    }
    for name, records in asked.items():
        if not records:
            raise DataError(f"{place}: the {name} split holds no query; raise data.splits.{name}")
    trained = read_split(data, "cl") if knowledge else ()
    answers = (text for record in trained for text in record.positives)
    judged = Judgements.of(chain(*asked.values()), answers)
    tasks, ids = [], iter(judged.queries)
    for name, records in asked.items():
        own = judged.choose(islice(ids, len(records)))
        if max_queries is not None:
            own = own.choose(own.sample(max_queries, seed))
        told_by = manifest.prepared if knowledge and name == "eval" else ""
        tasks.append(HeldOutTask(f"{Path(place).resolve().name}-{name}", own, told_by))
    return tasks


def split_names(text: str) -> list[str]:
    """`A,B(x, v1),C` -> [`A`, `B(x, v1)`, `C`]: mteb's benchmark names hold commas themselves."""
    names, depth, start = [], 0, 0
    for place, letter in enumerate(text + ","):
        depth += (letter == "(") - (letter == ")")
        if letter == "," and depth <= 0:
            names.append(text[start:place].strip())
            start = place + 1
    return [name for name in names if name]


def official_tasks(names: Iterable[str]) -> list[AbsTask]:
    """The tasks with these names; the name of a benchmark stands for all of its tasks.

    Reads mteb's registry only; data is fetched when a task runs. A task named twice comes once.
    Raises ConfigError for an unknown name and for a task that is not about text.
    """
    benchmarks = {}
    for benchmark in mteb.get_benchmarks():
        for name in (benchmark.name, *(benchmark.aliases or ())):
            benchmarks[name] = benchmark
    found: dict[str, AbsTask] = {}
    for name in names:
        try:
            members = benchmarks[name].tasks if name in benchmarks else mteb.get_tasks([name])
        except KeyError:
            raise ConfigError(f"unknown task {name!r}; {_nearest(name, benchmarks)}") from None
        for task in members:
            if set(task.modalities) != {"text"}:
                raise ConfigError(f"task {task.metadata.name!r} is not text alone; leave it out")
            found.setdefault(task.metadata.name, task)
    return list(found.values())


def _nearest(name: str, benchmarks: Iterable[str]) -> str:
    """Up to four names that look like `name`, without regard to case, benchmarks first."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # mteb warns once for each of its beta tasks
        tasks = mteb.get_tasks(exclude_superseded=False, exclude_private=False, exclude_beta=False)
    known = {n.casefold(): n for n in [t.metadata.name for t in tasks] + list(benchmarks)}
    wanted = name.casefold()
    inside = [n for n in sorted(known) if wanted in n]
    near = [*inside, *difflib.get_close_matches(wanted, known, 4, cutoff=0.5)]
    if not near:
        return "mteb.get_benchmarks() and mteb.get_tasks() list what there is"
    return "nearest: " + ", ".join(known[n] for n in list(dict.fromkeys(near))[:4])
