"""Score a model on held-out data and on official tasks: a dict of scores, and OUT.json.

1. Load the model; make the held-out tasks and look up the official ones (`tasks.py`).
2. Refuse a model of ours that was trained on their texts (`contamination.py`).
3. Score each task (`scoring.py`); two tasks of one data folder share the document vectors.
4. On request: let a model of ours generate the held-out answers (`generation.py`), and score every
   layer and pooling of it (`layers.py`).
"""

from __future__ import annotations

import functools
import logging
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mteb.abstasks.abstask import AbsTask
from mteb.models import MTEBModels

from lbr_ds import lineage
from lbr_ds.distributed import ALONE, World, leave
from lbr_ds.errors import ConfigError
from lbr_ds.evaluation.by_bottleneck import score_counts
from lbr_ds.evaluation.compression import check_dimensions, score_compressed
from lbr_ds.evaluation.contamination import check_overlap
from lbr_ds.evaluation.documents import Documents
from lbr_ds.evaluation.generation import score_generation
from lbr_ds.evaluation.judgements import Judgements
from lbr_ds.evaluation.layers import score_layers
from lbr_ds.evaluation.library_logs import silence_libraries
from lbr_ds.evaluation.models import OwnModel, load_model
from lbr_ds.evaluation.scoring import Measure, fetch, score_task
from lbr_ds.evaluation.tasks import HeldOutTask, held_out_tasks, official_tasks
from lbr_ds.instructions import bare
from lbr_ds.runs import BEST, ResolvedModel, checkpoint_name, choice, resolve_model
from lbr_ds.system import environment
from lbr_ds.system.atomic import write_json
from lbr_ds.system.progress import no_progress, show_progress
from lbr_ds.system.urls import public_url

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EvalOptions:
    """How a model is scored.

    Attributes:
        batch_size: Texts per forward pass of sentence-transformers models.
        batch_tokens: Tokens per forward pass of lbr-ds models; None: as suits the device.
        max_queries: Score a sample of the held-out queries, drawn by `seed`; the corpus stays
            whole. None: all.
        examples: Report this many queries with their top 3 passages, the same for every model.
        seed: Of the sample and the examples.
        trust_remote_code: Whether code from a model's repository may run.
        allow_overlap: Score an lbr-ds model on texts that it was trained on, and report how many.
        generation: Also score generated answers (lbr-ds models; `generation.py`).
        states: Also score retrieval by layer and pooling (lbr-ds models; `layers.py`).
        instructed: Give the instructions of the data to other models, too.
        instructions_of: The source whose instructions an lbr-ds model uses on official tasks.
        checkpoint: Of a run or a stage: best, last, or a step (`runs.model_folder`).
        dimensions: Also score the held-out vectors truncated to these lengths; None: to those that
            an lbr-ds model was trained for (`stage2.matryoshka`).
        bottleneck: Also score the held-out texts read with these numbers of bottleneck tokens
            (lbr-ds models; `by_bottleneck.py`).
        quantized: Also score them as int8 and binary vectors (`compression.py`).
    """

    batch_size: int = 64
    batch_tokens: int | None = None
    max_queries: int | None = None
    examples: int = 0
    seed: int = 0
    trust_remote_code: bool = False
    allow_overlap: bool = False
    generation: bool = False
    states: bool = False
    instructed: bool = False
    instructions_of: str = ""
    checkpoint: str = BEST
    dimensions: tuple[int, ...] | None = None
    quantized: bool = False
    bottleneck: tuple[int, ...] = ()


_DEFAULTS = EvalOptions()


def evaluate(
    model: str,
    *,
    data: Path | str | None = None,
    general: Path | str | None = None,
    tasks: Sequence[str] = (),
    output: Path | None = None,
    options: EvalOptions = _DEFAULTS,
    world: World = ALONE,
) -> dict[str, Any]:
    """Score a model on the eval split of prepared data and on official tasks.

    Args:
        model: A folder, a run, a checkpoint, or a name; see `load_model`.
        data: A prepared data folder or its URL.
        general: Another one, of texts outside the domain.
        tasks: Names of mteb tasks or benchmarks.
        output: A JSON file for the result.
        options: How to score.
        world: Its ranks share the encoding; the first one does the rest.

    Returns:
        {"model", "checkpoint": its name or None, "data", "seed", "seconds", "environment",
        "max_queries", "tasks": {name: scores}, "per_query": {name: {query id: nDCG@10}}}, with data
        also "protocol", on request "general", "examples", "generation", "states" and "bottleneck".
        Scores: recall_at_10, ndcg_at_10, mrr_at_10 (or main_score and metric), queries, documents;
        of a held-out task also those of `geometry.measure`, compressed and by_source.

    Raises:
        ConfigError: An unknown task or model, or nothing to score on.
        DataError: The data is missing, or the model was trained on texts of a task.
        CheckpointError: The model is damaged.
        EnvironmentProblem: A model or a task's texts cannot be downloaded.
    """
    resolved = resolve_model(model, options.checkpoint)
    _check_inspectable(model, resolved, data, options)
    place = _place(model, resolved, options.checkpoint)
    started = time.perf_counter()
    chosen = _choose_tasks(data, general, tasks, options, instructed=not resolved.ours)
    of_data = [task for task in chosen if isinstance(task, HeldOutTask)]
    held_out = [task for task in of_data if general is None or task.place != public_url(general)]
    with silence_libraries():
        overlap = check_overlap(place, chosen, options.allow_overlap, fetch)
        scores = _score_all(_load(place, options, world), resolved, chosen, options, world)
    result: dict[str, Any] = {
        "model": model,
        "checkpoint": checkpoint_name(resolved.folder),
        "data": None if data is None else public_url(data),
        "max_queries": options.max_queries,
        "seed": options.seed,
        "seconds": round(time.perf_counter() - started, 2),
        "tasks": scores,
        "per_query": {task.metadata.name: task.per_query for task in of_data},
        "environment": _environment(),
    }
    result |= ({"overlap": overlap} if overlap else {}) | _of_data(held_out, general, options)
    result |= _inspect(resolved, held_out, options) if world.first else {}
    if world.first and output is not None:
        write_json(output, result)
    return result


def _of_data(
    held_out: Sequence[HeldOutTask], general: Path | str | None, options: EvalOptions
) -> dict[str, Any]:
    """Return how the data was split, examples of what is found in it, and the other folder."""
    found: dict[str, Any] = {} if general is None else {"general": public_url(general)}
    if held_out:
        found["protocol"] = f"{'knowledge' if len(held_out) > 1 else 'random'} split"
        found |= _examples(held_out[0], options.examples, options.seed)
    return found


def _place(model: str, resolved: ResolvedModel, checkpoint: str) -> str:
    """Return the model folder that a run or a stage means; else `model`.

    It is fixed at the start: a training may save another checkpoint meanwhile.
    """
    if not resolved.packed or resolved.folder is None:
        return model
    log.info("scoring %s", choice(resolved.folder, checkpoint))
    return str(resolved.folder)


def _check_inspectable(
    model: str, resolved: ResolvedModel, data: Path | str | None, options: EvalOptions
) -> None:
    """Raise ConfigError unless what was requested beyond retrieval scores can be computed."""
    if (options.dimensions or options.quantized) and data is None:
        raise ConfigError(
            f"{model}: --dimensions and --quantized score the vectors of held-out data; give --data"
        )
    inspected = options.generation or options.states or options.bottleneck
    if inspected and not (resolved.ours and data is not None):
        raise ConfigError(
            f"{model}: --generation, --states and --bottleneck need a run, a checkpoint or a "
            "folder of lbr-ds, and --data; leave them out for other models"
        )


def _compression(
    encoder: MTEBModels, resolved: ResolvedModel, options: EvalOptions
) -> Measure | None:
    """Return what scores truncated and quantised vectors; None: nothing to score."""
    dimensions = options.dimensions
    if dimensions is None:
        own = lineage.load(resolved.folder) if resolved.ours and resolved.folder else None
        dimensions = own.dimensions if own else ()
    if not dimensions and not options.quantized:
        return None
    if isinstance(encoder, OwnModel):  # before the corpus is encoded
        check_dimensions(dimensions, encoder.encoder.dimension)
    chosen, quantized = dimensions, options.quantized

    def measure(queries: np.ndarray, documents: np.ndarray, judged: Judgements) -> dict[str, Any]:
        rows = score_compressed(queries, documents, judged, chosen, quantized=quantized)
        return {"compressed": rows}

    return measure


def _inspect(
    resolved: ResolvedModel, held_out: Sequence[HeldOutTask], options: EvalOptions
) -> dict[str, Any]:
    """Return what was requested beyond retrieval scores."""
    wanted: dict[str, Callable[[Path, Judgements], Any]] = {}
    wanted |= {"generation": score_generation} if options.generation else {}
    wanted |= {"states": score_layers} if options.states else {}
    counts = functools.partial(score_counts, counts=options.bottleneck)
    wanted |= {"bottleneck": counts} if options.bottleneck else {}
    if not wanted:
        return {}
    assert resolved.folder is not None
    return {name: score(resolved.folder, held_out[0].judged) for name, score in wanted.items()}


def _choose_tasks(
    data: Path | str | None,
    general: Path | str | None,
    names: Sequence[str],
    options: EvalOptions,
    *,
    instructed: bool,
) -> list[AbsTask]:
    """Return the tasks of the data, of the general data, and the official ones.

    Raises:
        ConfigError: There is none, or two have one name.
    """
    if data is None and not names:
        raise ConfigError("nothing to evaluate on; give data, or tasks, or both")
    if general is not None and data is None:
        raise ConfigError("--general needs --data, the data of the domain; give both")
    chosen: list[AbsTask] = []
    for place in (data, general):
        if place is not None:
            chosen += held_out_tasks(
                place,
                max_queries=options.max_queries,
                seed=options.seed,
                instructed=instructed and options.instructed,
            )
    if len({task.metadata.name for task in chosen}) < len(chosen):
        raise ConfigError(
            f"{data} and {general}: their scores would have the same name; rename one folder"
        )
    return chosen + official_tasks(names)


def _load(model: str, options: EvalOptions, world: World) -> MTEBModels:
    return load_model(
        model,
        batch_tokens=options.batch_tokens,
        batch_size=options.batch_size,
        trust_remote_code=options.trust_remote_code,
        instructions_of=options.instructions_of,
        world=world,
    )


def _score_all(
    encoder: MTEBModels,
    resolved: ResolvedModel,
    tasks: Sequence[AbsTask],
    options: EvalOptions,
    world: World,
) -> dict[str, dict[str, Any]]:
    """Return each task's scores by its name; afterwards the ranks leave the process group."""
    show = world.first and sys.stderr.isatty()
    if isinstance(encoder, OwnModel) and not all(isinstance(task, HeldOutTask) for task in tasks):
        encoder.warn_of_several_instructions()
    measure = _compression(encoder, resolved, options)
    # Vectors of the held-out tasks, by data folder: its tasks share one corpus.
    documents: dict[str, Documents] = defaultdict(functools.partial(Documents, keep=world.first))
    scores = {}
    with show_progress() if world.first else nullcontext(no_progress) as progress:
        for number, task in enumerate(tasks, 1):
            known = documents[getattr(task, "place", "")]
            scores[task.metadata.name] = score_task(
                encoder, task, options.batch_size, show, known, measure
            )
            progress("eval: tasks", number, len(tasks))
    if world.size > 1:
        leave()
    return scores


def _examples(task: HeldOutTask, count: int, seed: int) -> dict[str, Any]:
    """Return "examples": `count` queries, the same for every model, with their top 3 passages."""
    chosen = task.judged.sample(count, seed) if count else []
    return {"examples": [_example(task, i, 3) for i in chosen]} if chosen else {}


def _example(task: HeldOutTask, query_id: str, k: int) -> dict[str, Any]:
    """Return one query with its answers and its top k passages; ranks start at 1."""
    judged, right = task.judged, task.judged.relevant[query_id]
    ranking = sorted(task.rankings[query_id].items(), key=lambda item: -item[1])
    first = next((rank for rank, (i, _) in enumerate(ranking, 1) if i in right), None)
    passages = [
        {"text": bare(judged.documents[i]), "score": round(score, 4), "right": i in right}
        for i, score in ranking[:k]
    ]
    return {
        "id": query_id,
        "query": bare(judged.queries[query_id]),
        "answers": [bare(judged.documents[i]) for i in right],
        "first_right": first,
        "passages": passages,
    }


def _environment() -> dict[str, Any]:
    """Return versions, machine, device and threads."""
    return {"device": "cpu", **environment.describe(), "threads": torch.get_num_threads()}
