"""Make mteb retrieval tasks of held-out records, and look up official mteb tasks by name."""

from __future__ import annotations

import difflib
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import mteb
from datasets import Dataset
from mteb.abstasks import AbsTaskRetrieval
from mteb.abstasks.abstask import AbsTask

from lbr_ds.errors import ConfigError
from lbr_ds.evaluation.judgements import Judgements, read_held_out
from lbr_ds.evaluation.languages import languages_of
from lbr_ds.instructions import Side, bare
from lbr_ds.shards.sources import OTHERS, largest
from lbr_ds.system.urls import public_url

SPLIT = "test"


class HeldOutTask(AbsTaskRetrieval):
    """An mteb retrieval task over `Judgements`, in memory; keeps each query's score and ranking.

    Attributes:
        judged: Queries, documents and relevance.
        facts_in: Under protocol knowledge the fingerprint of the data, whose gl states facts about
            these queries on purpose; "" otherwise.
        wanted: `data.languages`, for mteb's metadata (`languages.py`).
        place: The prepared folder or URL; tasks of one place share their documents.
        instructed: Whether mteb gets the texts with the instructions of the data. If not, it gets
            the bare texts, and an lbr-ds model gets those of `texts`.
        sources: {query id: source of its record}.
        per_query: After scoring, {query id: nDCG@10}.
        recalls: After scoring, {query id: Recall@10}.
        rankings: After scoring, {query id: {document id: score}}.
    """

    k_values = (1, 3, 5, 10, 20, 100)

    def __init__(
        self,
        name: str,
        judged: Judgements,
        facts_in: str = "",
        wanted: Sequence[str] = (),
        *,
        instructed: bool = False,
        place: str = "",
        sources: Mapping[str, str] | None = None,
    ) -> None:
        self.metadata = mteb.TaskMetadata(
            name=name,
            description="Held-out records of a domain corpus: find the passage that answers.",
            dataset={"path": "local", "revision": "local"},
            type="Retrieval",
            category="t2t",
            eval_splits=[SPLIT],
            eval_langs=languages_of(
                map(bare, [*judged.queries.values(), *judged.documents.values()]), wanted
            ),
            main_score="ndcg_at_10",
        )
        super().__init__()
        self.judged = judged
        self.facts_in, self.wanted, self.instructed = facts_in, wanted, instructed
        self.place = place
        self.sources = dict(sources or {})
        self.per_query: dict[str, float] = {}
        self.recalls: dict[str, float] = {}
        self.rankings: dict[str, dict[str, float]] = {}
        self.load_data()

    def load_data(self, *args: Any, **kwargs: Any) -> None:
        """Give mteb the texts; needs no file and no network."""
        judged, form = self.judged, str if self.instructed else bare
        queries = [{"id": i, "text": form(t)} for i, t in judged.queries.items()]
        corpus = [{"id": i, "title": "", "text": form(t)} for i, t in judged.documents.items()]
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

    def texts(self, side: Side, ids: Iterable[str]) -> list[str]:
        """Return queries or documents with their instructions, for a model trained with them."""
        texts = self.judged.queries if side == "query" else self.judged.documents
        return [texts[i] for i in ids]

    def task_specific_scores(
        self,
        scores: dict[str, dict[str, float]],
        qrels: Any,
        results: dict[str, dict[str, float]],
        hf_split: str,
        hf_subset: str,
    ) -> dict[str, float]:
        """Keep the scores and rankings; mteb calls this after scoring."""
        self.per_query = {i: round(s["ndcg_cut_10"], 5) for i, s in scores.items()}
        self.recalls = {i: s["recall_10"] for i, s in scores.items()}
        self.rankings = results
        return {}

    def by_source(self) -> dict[str, dict[str, float]]:
        """Return what the queries of each source score; {} where they are all of one.

        After scoring. Every query is compared with the documents of all sources. More than
        MAX_TRACKED sources: the largest, and the others together.
        """
        shown = largest(Counter(self.sources[i] for i in self.per_query if i in self.sources))
        parts: dict[str, list[str]] = {name: [] for name in shown}
        for query in self.per_query if shown else ():
            name = self.sources.get(query, OTHERS)
            parts.setdefault(name if name in parts else OTHERS, []).append(query)
        return {
            name: {
                "queries": len(queries),
                "recall_at_10": round(fmean(self.recalls[i] for i in queries), 5),
                "ndcg_at_10": round(fmean(self.per_query[i] for i in queries), 5),
            }
            for name, queries in parts.items()
        }


def held_out_tasks(
    data: Path | str, *, max_queries: int | None = None, seed: int = 0, instructed: bool = False
) -> list[HeldOutTask]:
    """Return the held-out tasks of prepared data: `NAME-eval`, and `NAME-control` if there is one.

    Under protocol knowledge there is a control, over the same documents.

    Args:
        data: A prepared folder or its URL.
        max_queries: Use this many queries of each, drawn by `seed`; None: all.
        seed: Of the sample.
        instructed: See `HeldOutTask`.

    Raises:
        DataError: A split is missing or holds no query.
    """
    tasks = []
    for part in read_held_out(data):
        own = part.judged
        if max_queries is not None:
            own = own.select(own.sample(max_queries, seed))
        sources = dict(zip(part.judged.queries, (r.source for r in part.records), strict=True))
        name = f"{Path(public_url(data)).resolve().name}-{part.split}"
        tasks.append(
            HeldOutTask(
                name,
                own,
                part.facts_in,
                part.languages,
                instructed=instructed,
                place=public_url(data),
                sources=sources,
            )
        )
    return tasks


def split_names(text: str) -> list[str]:
    """Split `A,B(x, v1),C` into [`A`, `B(x, v1)`, `C`]: names of benchmarks may hold commas."""
    names, depth, start = [], 0, 0
    for place, letter in enumerate(text + ","):
        depth += (letter == "(") - (letter == ")")
        if letter == "," and depth <= 0:
            names.append(text[start:place].strip())
            start = place + 1
    return [name for name in names if name]


def official_tasks(names: Iterable[str]) -> list[AbsTask]:
    """Return the tasks with these names, each once; a benchmark's name means all of its tasks.

    Data is downloaded when a task is scored, not here.

    Raises:
        ConfigError: A name is unknown, or a task is not about text only.
    """
    benchmarks = {}
    for benchmark in mteb.get_benchmarks():
        for name in (benchmark.name, *(benchmark.aliases or ())):
            benchmarks[name] = benchmark
    tasks: dict[str, AbsTask] = {}
    for name in names:
        try:
            members = benchmarks[name].tasks if name in benchmarks else mteb.get_tasks([name])
        except KeyError:
            raise ConfigError(f"unknown task {name!r}; {_nearest(name, benchmarks)}") from None
        for task in members:
            if set(task.modalities) != {"text"}:
                raise ConfigError(f"task {task.metadata.name!r} is not about text only; remove it")
            tasks.setdefault(task.metadata.name, task)
    return list(tasks.values())


def _nearest(name: str, benchmarks: Iterable[str]) -> str:
    """Return up to four similar names, ignoring case, benchmarks first."""
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
