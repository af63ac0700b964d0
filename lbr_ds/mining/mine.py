"""Add hard negatives to cl: everything that `lbr-ds mine` does.

Memory: the text of cl and of the passages, five times that while BM25 indexes it, and the hashes of
eval's texts; vectors stay on disk and pass through in blocks (`vectors.py`, `dense.py`).

Vectors and rankings are stored in `DATA.mining/`, beside DATA: a killed command resumes there, and
mining again with other rules encodes and searches nothing. It may be deleted at any time.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from numpy.typing import NDArray

import lbr_ds
from lbr_ds.config import MiningConfig, RunConfig
from lbr_ds.corpora.curate import leaks
from lbr_ds.corpora.prepare import MINING
from lbr_ds.distributed import ALONE, World, leave
from lbr_ds.encoder import Encoder
from lbr_ds.errors import DataError
from lbr_ds.mining.pool import Pool
from lbr_ds.mining.ranking import Ranking
from lbr_ds.mining.rewrite import TEACH, fingerprint_before, on_ranks, rewrite, source_split
from lbr_ds.mining.rules import Chooser, Guide, Negative
from lbr_ds.mining.vectors import Vectors, embed, embed_share, is_key
from lbr_ds.records import Record
from lbr_ds.shards import Manifest, read_split
from lbr_ds.shards.in_use import refuse_in_use
from lbr_ds.system.atomic import check_replaceable
from lbr_ds.system.progress import Progress, no_progress

log = logging.getLogger(__name__)
EXAMPLES = 10
_RULES = 2  # increase it when the same settings would give other negatives
_TEACHERS = {"score_with", "teacher_vectors"}  # keys of `teach.py`
_CHARS = 600  # of a text shown in the audit


def mine(
    run: RunConfig, progress: Progress = no_progress, world: World = ALONE, *, stay: bool = False
) -> dict[str, Any] | None:
    """Add hard negatives to the cl records of `run.data.folder`, after those that they came with.

    The same data, settings, models and seed give the same bytes, so a folder that has these
    negatives already is not changed.

    Args:
        run: The recipe.
        progress: Called with the part, what is done and the total.
        world: Its ranks share the encoding and the search; the first does the rest.
        stay: Whether the ranks stay joined, for `teach`.

    Returns:
        The content of DATA/mining.json and "reused"; None on other ranks than the first.

    Raises:
        ConfigError: A model's folder holds no model.
        DataError: The data is missing or damaged, or cl has no query.
        EnvironmentProblem: A model cannot be loaded, the disk is full, or another process writes
            the folder.
    """
    folder = check_replaceable(run.data.local_folder)

    def share(shown: Progress) -> None:
        encode(run, world, shown, stay=stay)

    return on_ranks(folder, world, share, lambda: _mine(run, folder, progress), progress)


def _mine(run: RunConfig, folder: Path, progress: Progress) -> dict[str, Any]:
    manifest = Manifest.load(folder)
    encoders = _encoders(run.mining)
    fingerprint = _fingerprint(run, manifest, encoders)
    if _holds(manifest, fingerprint):
        log.info("%s holds these negatives already, reused", folder)
        return {**json.loads((folder / MINING).read_bytes()), "reused": True}
    refuse_in_use(folder, ["cl"])  # stage 1 may continue: the other splits keep their bytes
    records, pool = _read(run, manifest)
    chooser, chosen = _search(run, pool, encoders, work_folder(manifest), progress)
    audit = _audit(run, pool, chooser, chosen, encoders, fingerprint)
    mined = _with_negatives(records, pool, chosen)
    rewrite(manifest, mined, audit, run.data.records_per_shard, progress)
    return {**audit, "reused": False}


def encode(
    run: RunConfig, world: World, progress: Progress = no_progress, *, stay: bool = False
) -> None:
    """Make this rank's share of the vectors and of the search, which `mine` then reads from disk.

    Every rank calls it, and leaves the process group when everything exists, or with `stay`
    waits for the others and does not leave. It does nothing without a model in the recipe, or if
    the folder has these negatives. Errors as for `mine`.
    """
    manifest = Manifest.load(run.data.local_folder.resolve())
    encoders, work = _encoders(run.mining), work_folder(manifest)
    if encoders and not _holds(manifest, _fingerprint(run, manifest, encoders)):
        _, pool = _read(run, manifest)
        for encoder in encoders.values():
            embed_share(_queries(pool), encoder, "query", work, world, progress)
            embed_share(pool.instructed, encoder, "document", work, world, progress)
        world.barrier()
        if "dense" in encoders:
            from lbr_ds.mining.dense import rank_share

            vectors = _vectors(pool, encoders["dense"], work)
            rank_share(pool, *vectors, run.mining.ranks[1], work, world, progress)
    if stay:
        world.barrier()
    else:
        leave()


def _holds(manifest: Manifest, fingerprint: str) -> bool:
    """Return whether the data has these negatives already."""
    same = fingerprint_before(manifest, TEACH).partition("-")[0] == fingerprint
    return same and (manifest.folder / MINING).is_file()


def work_folder(manifest: Manifest) -> Path:
    """Return the folder of the vectors."""
    return manifest.folder.with_name(f"{manifest.folder.name}.mining")


def _read(run: RunConfig, manifest: Manifest) -> tuple[list[Record], Pool]:
    """Return cl as it was prepared, and its queries and passages."""
    folder = manifest.folder
    records = list(read_split(folder, source_split(manifest)))
    others = read_split(folder, "gl") if "gl" in run.mining.passages else ()
    held_out = [read_split(folder, name) for name in leaks.JUDGED if name in manifest.splits]
    pool = Pool.of(records, others, chain(*held_out))
    if not pool.queries:
        raise DataError(f"{folder}: cl holds no query, only passages; there is nothing to mine for")
    return records, pool


def _queries(pool: Pool) -> list[str]:
    return [record.instructed_query() for record in pool.queries]


def _encoders(mining: MiningConfig) -> dict[str, Encoder]:
    """Return the models of `dense` and `guide`; one name is loaded once."""
    names = {"dense": mining.model if "dense" in mining.methods else "", "guide": mining.guide}
    trust = mining.trust_remote_code
    encoders = {name: Encoder(name, trust_remote_code=trust) for name in names.values() if name}
    return {part: encoders[name] for part, name in names.items() if name}


def _fingerprint(run: RunConfig, manifest: Manifest, encoders: dict[str, Encoder]) -> str:
    """Hash of all that decides the negatives; a model counts by its content, not by its name."""
    shards = [
        s.sha256
        for name in (source_split(manifest), "gl", *leaks.JUDGED)
        for s in manifest.splits.get(name, [])
    ]
    settings = json.loads(
        run.mining.model_dump_json(exclude={"model", "guide", "trust_remote_code", *_TEACHERS})
    )
    models = {part: encoder.fingerprint for part, encoder in encoders.items()}
    plain = [
        _RULES,
        lbr_ds.__version__,
        run.seed,
        run.data.records_per_shard,
        settings,
        models,
        shards,
    ]
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:16]


def _search(
    run: RunConfig,
    pool: Pool,
    encoders: dict[str, Encoder],
    work: Path,
    progress: Progress,
) -> tuple[Chooser, list[list[Negative]]]:
    """Rank and choose, one query after the other; return the negatives of each."""
    last = run.mining.ranks[1]
    searched = set[str]()
    vectors = {part: _vectors(pool, encoder, work, progress) for part, encoder in encoders.items()}
    ranked: dict[str, Iterator[Ranking]] = {}
    for method in run.mining.methods:
        if method == "bm25":
            from lbr_ds.mining import bm25

            ranked[method] = bm25.rank(pool, last, progress)
        else:
            from lbr_ds.mining import dense

            ranked[method] = dense.rank(pool, *vectors["dense"], last, work, progress)
            searched = {dense.rank_key(pool, *vectors["dense"], last)}
    guide = _VectorGuide(pool, *vectors["guide"]) if "guide" in vectors else None
    chooser = Chooser(pool, run.mining, run.seed, guide, near_duplicate=run.data.near_duplicate)
    chosen = [
        chooser.choose(query, dict(zip(ranked, rankings, strict=True)))
        for query, rankings in enumerate(zip(*ranked.values(), strict=True))
    ]
    used = {part.folder.name for pair in vectors.values() for part in pair} | searched
    _forget_others(work, used)
    return chooser, chosen


class _VectorGuide(Guide):
    """The guide model's inner products."""

    def __init__(self, pool: Pool, queries: Vectors, passages: Vectors) -> None:
        self.pool, self.queries, self.passages = pool, queries, passages

    def scores(self, query: int, passages: NDArray[np.int64]) -> tuple[NDArray[np.float32], float]:
        row = self.queries.rows(np.array([query]))[0]
        positives = self.passages.rows(self.pool.positives[query]) @ row
        return self.passages.rows(passages) @ row, float(positives.min(initial=np.inf))


def _vectors(
    pool: Pool, encoder: Encoder, work: Path, progress: Progress = no_progress
) -> tuple[Vectors, Vectors]:
    """Return the vectors of the queries and of the passages; make those that are missing."""
    return (
        embed(_queries(pool), encoder, "query", work, progress),
        embed(pool.instructed, encoder, "document", work, progress),
    )


def _forget_others(work: Path, used: set[str]) -> None:
    """Remove vectors and rankings of other texts or models, which nothing would read again."""
    for folder in work.iterdir() if used else ():
        if folder.name not in used and is_key(folder.name):
            shutil.rmtree(folder)


def _with_negatives(
    records: Sequence[Record], pool: Pool, chosen: Sequence[Sequence[Negative]]
) -> list[Record]:
    """Return the records in their order, mined negatives after the given ones."""
    mined = iter(chosen)
    made = []
    for record in records:
        found = [pool.passages[n.passage] for n in next(mined)] if record.query else []
        # Mined negatives have no score of the teacher who scored the given ones.
        scores = [] if found else record.negative_scores
        negatives = record.negatives + found
        made.append(replace(record, negatives=negatives, negative_scores=scores))
    return made


def _audit(
    run: RunConfig,
    pool: Pool,
    chooser: Chooser,
    chosen: Sequence[Sequence[Negative]],
    encoders: dict[str, Encoder],
    fingerprint: str,
) -> dict[str, Any]:
    """Return the content of mining.json, without times and paths, so that it is reproducible."""
    tally = chooser.tally
    mined = [query for query, negatives in enumerate(chosen) if negatives]
    drawn = sorted(Random(run.seed).sample(mined, min(EXAMPLES, len(mined))))
    return {
        "fingerprint": fingerprint,
        "program": lbr_ds.__version__,
        "seed": run.seed,
        "settings": json.loads(run.mining.model_dump_json(exclude=_TEACHERS)),
        "models": {
            part: {"name": e.name, "fingerprint": e.fingerprint} for part, e in encoders.items()
        },
        "passages": len(pool.passages),
        "passages_left_out_as_held_out": pool.held_out,
        "queries": len(pool.queries),
        "candidates_seen": tally.seen,
        "kept": tally.kept,
        "dropped": dict(tally.dropped),
        "queries_left_short": tally.short,
        "queries_with_none": tally.none,
        "examples": [_example(pool, query, chosen[query][0]) for query in drawn],
    }


def _example(pool: Pool, query: int, negative: Negative) -> dict[str, Any]:
    """Return a query with its first positive and its first negative, truncated."""
    record = pool.queries[query]
    ratio = negative.score / negative.positive if negative.positive > 0 else None
    return {
        "id": record.id,
        "query": record.query[:_CHARS],
        "positive": record.positives[0][:_CHARS],
        "negative": pool.passages[negative.passage][:_CHARS],
        "method": negative.method,
        "rank": negative.rank,
        "score": round(negative.score, 4),
        "score_of_positive": round(negative.positive, 4),
        "ratio": None if ratio is None else round(ratio, 3),
    }
