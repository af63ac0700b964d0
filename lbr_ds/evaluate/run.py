"""MODEL and DATA or task names -> a dict of scores, and OUT.json.

1. Load the model; build the held-out task and look up the official ones.
2. Per task: load its texts, let `mteb.evaluate` encode, search and score, let go of the texts.
   Two tasks of one folder (`tasks.py`) share the vectors of their documents.
3. Keep each held-out query's ndcg@10 and, when asked, its top passages, from that same search; and
   measure the vectors that went into it (`geometry.py`).
4. When asked, let a model of ours write the held-out answers (`generation.py`), and score what
   else of it could be read (`states.py`).
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import mteb
import numpy as np
import torch
from mteb.abstasks.abstask import AbsTask
from mteb.models import MTEBModels

from lbr_ds import runs
from lbr_ds.distributed import ALONE, World, leave
from lbr_ds.errors import ConfigError, EnvironmentProblem
from lbr_ds.evaluate import geometry
from lbr_ds.evaluate.generation import score_generation
from lbr_ds.evaluate.judged import Judgements
from lbr_ds.evaluate.models import OWN, is_ours, load_model
from lbr_ds.evaluate.overlap import check_overlap
from lbr_ds.evaluate.quiet import quiet
from lbr_ds.evaluate.states import score_states
from lbr_ds.evaluate.tasks import HeldOutTask, held_out_task, held_out_tasks, official_tasks
from lbr_ds.instructions import bare
from lbr_ds.system import environment
from lbr_ds.system.atomic import write_json
from lbr_ds.system.urls import public_url

METRICS = ("recall_at_10", "ndcg_at_10", "mrr_at_10")


def evaluate(
    model: str,
    *,
    data: Path | str | None = None,
    tasks: Sequence[str] = (),
    output: Path | None = None,
    batch_size: int = 64,
    batch_tokens: int | None = None,
    max_queries: int | None = None,
    examples: int = 0,
    seed: int = 0,
    trust_remote_code: bool = False,
    allow_overlap: bool = False,
    generation: bool = False,
    states: bool = False,
    instructed: bool = False,
    instructions_of: str = "",
    world: World = ALONE,
) -> dict[str, Any]:
    """Scores of `model` on DATA's eval split and on official tasks; written to `output` too.

    model: see `load_model`. batch_size: texts a batch for sentence-transformers; batch_tokens:
    tokens a batch for our own encoder (None: as suits the device). max_queries: a sample of the
    held-out queries, drawn by seed (the corpus stays whole). examples: so many queries with their
    top 3 passages, the same ones for every model. allow_overlap: score a model of ours on texts
    that it was trained on too, and say so under "overlap". generation, states: also what those
    modules find of a model of ours. instructed: others get DATA's instructions too.
    instructions_of: a source whose instructions ours gets on official tasks. world: its ranks share
    the encoding and part; what comes after and the file are the first rank's alone.
    Returns {"model", "data", "max_queries", "seed", "seconds", "tasks": {name: {"recall_at_10",
    "ndcg_at_10", "mrr_at_10", "queries", "documents"}}, "per_query": {name: {id: ndcg_at_10}},
    "environment"}, with data "protocol" ("random split", or "knowledge split" with the control as a
    second task), and "examples", "generation", "states" when asked. A held-out task also has what
    `geometry.measure` gives; one that is no retrieval has "main_score" and "metric" instead.
    Raises ConfigError, DataError or EnvironmentProblem with one line.
    """
    card = _ours(model, data) if generation or states else None
    started = time.perf_counter()
    chosen = _chosen(data, tasks, max_queries, seed, instructed and not is_ours(model))
    with quiet():
        overlap = check_overlap(model, chosen, allow_overlap, fetch=_fetch)
        options: Any = {"batch_tokens": batch_tokens, "trust_remote_code": trust_remote_code}
        encoder = load_model(model, **options, instructions_of=instructions_of, world=world)
        scores = _judge_all(encoder, chosen, batch_size, world)
    held_out = [task for task in chosen if isinstance(task, HeldOutTask)]
    result: dict[str, Any] = {
        "model": model,
        "data": None if data is None else public_url(data),
        "max_queries": max_queries,
        "seed": seed,
        "seconds": round(time.perf_counter() - started, 2),
        "tasks": scores,
        "per_query": {task.metadata.name: task.per_query for task in held_out},
        "environment": _environment(),
        **_stated(held_out, overlap),
    }
    result |= {"examples": _examples(held_out[0], examples, seed)} if examples and held_out else {}
    if card is not None and world.first:
        result |= _looked_into(card, held_out[0], generation, states)
    if output is not None and world.first:
        write_json(output, result)
    return result


def _looked_into(card: Path, task: HeldOutTask, generation: bool, states: bool) -> dict[str, Any]:
    """What is asked for beyond scores."""
    asked: dict[str, Callable[[Path, Judgements], Any]] = {}
    asked |= {"generation": score_generation} if generation else {}
    asked |= {"states": score_states} if states else {}
    return {name: score(card, task.judged) for name, score in asked.items()}


def _stated(held_out: list[HeldOutTask], overlap: dict[str, Any]) -> dict[str, Any]:
    """The protocol by which our own tasks were held out, and what training had all the same."""
    protocol = f"{'knowledge' if len(held_out) > 1 else 'random'} split"
    stated: dict[str, Any] = {"protocol": protocol} if held_out else {}
    return {**stated, "overlap": overlap} if overlap else stated


def _chosen(
    data: Path | str | None,
    names: Sequence[str],
    max_queries: int | None,
    seed: int,
    instructed: bool = False,
) -> list[AbsTask]:
    """Our own tasks first. Raises ConfigError where there is none at all."""
    if data is None and not names:
        raise ConfigError("nothing to evaluate on; give data, or tasks, or both")
    chosen: list[AbsTask] = list(official_tasks(names))
    if data is not None:
        chosen[:0] = held_out_tasks(data, max_queries=max_queries, seed=seed, instructed=instructed)
    return chosen


def _judge_all(
    encoder: MTEBModels, tasks: Sequence[AbsTask], batch_size: int, world: World
) -> dict[str, dict[str, Any]]:
    """Each task's scores by its name; then the ranks part, for what is left is the first's."""
    show = world.first and sys.stderr.isatty()
    if isinstance(encoder, OWN) and not all(isinstance(task, HeldOutTask) for task in tasks):
        encoder.say_what_is_unsettled()
    known: dict[str, np.ndarray] = {}  # of our own tasks, which have one corpus
    scores = {task.metadata.name: judge(encoder, task, batch_size, show, known) for task in tasks}
    if world.size > 1:
        leave()
    return scores


def _ours(model: str, data: Path | str | None) -> Path:
    """The folder of a model of ours that is to be looked into. Raises ConfigError for any other."""
    found = runs.find_model(model)
    if found.folder is None or not found.ours or data is None:
        raise ConfigError(
            f"{model}: --generation and --states need a run, a checkpoint or a folder of lbr-ds, "
            "and --data; leave them out for other models"
        )
    return found.folder


def top_passages(
    model: str,
    data: Path,
    queries: int | Sequence[str] = 5,
    k: int = 3,
    *,
    seed: int = 0,
    batch_size: int = 64,
) -> list[dict[str, Any]]:
    """What `model` finds for held-out queries: a number of them, drawn by seed, or given ids.

    Returns [{"id", "query", "answers": [text], "first_right": rank or None, "passages":
    [{"text", "score", "right"}]}]; rank 1 is the top, None is beyond 100.
    `evaluate(..., examples=n)` gives the same without encoding the corpus a second time.
    """
    if isinstance(queries, int):
        task = held_out_task(data, max_queries=queries, seed=seed)
    else:
        task = held_out_task(data, query_ids=queries)
    with quiet():
        judge(load_model(model, trust_remote_code=False), task, batch_size)
    return [_example(task, query_id, k) for query_id in task.judged.queries]


def judge(
    encoder: MTEBModels,
    task: AbsTask,
    batch_size: int = 64,
    show: bool | None = None,
    known: dict[str, np.ndarray] | None = None,
) -> dict[str, Any]:
    """One task's scores by mteb, with no result cache; averaged over splits and languages.

    For our own task the vectors are measured too, those that mteb's search asked for.
    show: progress bars; None: where there is a terminal. known: vectors of our own documents by id,
    used in place of encoding; those that are not there yet are put in.
    Raises EnvironmentProblem when the task's texts cannot be fetched.
    """
    _fetch(task)
    show = sys.stderr.isatty() if show is None else show
    with recorded(encoder, task if isinstance(task, HeldOutTask) else None, known) as seen:
        outcome = mteb.evaluate(
            encoder,
            task,
            cache=None,
            co2_tracker=False,
            show_progress_bar=show,
            encode_kwargs={"batch_size": batch_size, "show_progress_bar": show},
        )
    rows = [row for split in outcome.task_results[0].scores.values() for row in split]
    metrics = [m for m in METRICS if all(m in row for row in rows)]
    scores: dict[str, Any] = {m: round(float(np.mean([r[m] for r in rows])), 5) for m in metrics}
    if not metrics:
        scores["main_score"] = round(float(np.mean([r["main_score"] for r in rows])), 5)
        scores["metric"] = task.metadata.main_score
    scores |= _sizes(task)
    if not isinstance(task, HeldOutTask):
        task.unload_data()
    elif all(seen.values()):
        scores |= _geometry(task, seen)
    return scores


@contextlib.contextmanager
def recorded(
    encoder: Any, task: HeldOutTask | None, documents: dict[str, np.ndarray] | None = None
) -> Iterator[dict[str, dict[str, np.ndarray]]]:
    """While mteb searches, keep what `encoder` answers: {"query" or "document": {id: vector}}.

    task: one of our own; None: nothing is kept. A model of ours gets its texts with their
    instructions here. documents: what is known of them already, see `judge`. So the corpus is
    encoded once for scores, geometry and a second task. Models that are no encoders of single
    vectors (BM25, late interaction) leave nothing here.
    """
    seen = {"query": dict[str, np.ndarray](), "document": {} if documents is None else documents}
    encode: Callable[..., Any] | None = getattr(encoder, "encode", None) if task else None
    told = task if isinstance(encoder, OWN) else None

    def record(inputs: Any, *args: Any, **kwargs: Any) -> Any:
        assert encode is not None
        side = kwargs["prompt_type"].value
        known = seen[side]
        if known and all(i in known for i in inputs.dataset["id"]):
            return np.stack([known[i] for i in inputs.dataset["id"]])
        if told is not None:
            kwargs["instructed"] = told.texts(side, inputs.dataset["id"])
        vectors = encode(inputs, *args, **kwargs)
        rows = torch.as_tensor(vectors).float().cpu().numpy()
        if rows.ndim == 2:
            known.update(zip(inputs.dataset["id"], rows, strict=True))
        return vectors

    if encode is not None:
        encoder.encode = record
    try:
        yield seen
    finally:
        if encode is not None:
            del encoder.encode  # the class's own is in sight again


def _geometry(task: HeldOutTask, seen: dict[str, dict[str, np.ndarray]]) -> dict[str, float | None]:
    """`geometry.measure` of the vectors that were seen."""
    judged = task.judged
    return geometry.measure(
        np.stack([seen["query"][i] for i in judged.queries]),
        np.stack([seen["document"][i] for i in judged.documents]),
        *judged.places(),
    )


def _fetch(task: AbsTask) -> None:
    """Load the texts here, so that a missing network is told apart from a fault in scoring."""
    for part in getattr(task.metadata, "tasks", [task]):  # an aggregate is made of tasks
        try:
            part.load_data()
        except Exception as error:  # datasets, huggingface_hub and httpx each raise their own
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
            raise EnvironmentProblem(
                f"cannot fetch the texts of task {part.metadata.name}: {reason} "
                "(the network, or a local copy in the Hugging Face cache, is needed)"
            ) from error


def _sizes(task: AbsTask) -> dict[str, int | None]:
    """Number of queries and documents: counted for our own task, else as mteb's tables say."""
    if isinstance(task, HeldOutTask):
        judged = task.judged
        return {"queries": len(judged.queries), "documents": len(judged.documents)}
    tables: dict[str, Any] = dict(task.metadata.descriptive_stats or {})
    splits = [tables[name] for name in task.eval_splits if name in tables]

    def total(key: str) -> int | None:
        counts = [split[key] for split in splits if key in split]
        return sum(counts) if counts else None

    return {"queries": total("num_queries"), "documents": total("num_documents")}


def _examples(task: HeldOutTask, count: int, seed: int) -> list[dict[str, Any]]:
    """`count` queries, the same ones for every model, each with its top 3 passages."""
    return [_example(task, i, 3) for i in task.judged.sample(count, seed)]


def _example(task: HeldOutTask, query_id: str, k: int) -> dict[str, Any]:
    """One query with its right answers and the k passages that were found."""
    judged, right = task.judged, task.judged.relevant[query_id]
    found = sorted(task.rankings[query_id].items(), key=lambda item: -item[1])
    first = next((rank for rank, (i, _) in enumerate(found, 1) if i in right), None)
    passages = [
        {"text": bare(judged.documents[i]), "score": round(score, 4), "right": i in right}
        for i, score in found[:k]
    ]
    return {
        "id": query_id,
        "query": bare(judged.queries[query_id]),
        "answers": [bare(judged.documents[i]) for i in right],
        "first_right": first,
        "passages": passages,
    }


def _environment() -> dict[str, Any]:
    """What the numbers were made with."""
    return {
        "device": "cpu",
        **environment.describe(),
        "threads": torch.get_num_threads(),
    }
