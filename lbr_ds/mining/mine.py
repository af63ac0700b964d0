"""Add hard negatives to cl: everything that `lbr-ds mine` does.

Memory: texts and vectors are on disk and are read in blocks (`stored.py`, `vectors.py`,
`dense.py`); the first rank holds hashes of the texts (`pool.py`), and later 8 bytes for each
negative. BM25 builds its index in memory (`bm25.py`).

Texts, vectors and rankings are stored in `DATA.mining/`, beside DATA: a killed command resumes from
it, and mining again with other rules does not repeat the encoding and the search. It may be deleted
at any time.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Iterator
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
from lbr_ds.mining.audit import TEACHERS, Chosen, audit_of
from lbr_ds.mining.pool import META, Pool, make_pool
from lbr_ds.mining.ranking import Ranking
from lbr_ds.mining.remade import Mined
from lbr_ds.mining.rewrite import TEACH, fingerprint_before, on_ranks, rewrite, source_split
from lbr_ds.mining.rules import Chooser, Guide
from lbr_ds.mining.vectors import embed, embed_share, is_key
from lbr_ds.shards import Manifest, read_split
from lbr_ds.shards.in_use import refuse_in_use
from lbr_ds.system.atomic import atomic_folder, check_replaceable
from lbr_ds.system.blocks import Vectors
from lbr_ds.system.failures import writing
from lbr_ds.system.progress import Progress, no_progress

log = logging.getLogger(__name__)
_RULES = 2  # increase it when the same settings would give other negatives
_POOL = "pool"  # the event that rank 0 signals when the passages are on disk
_FORMAT = 1  # of a pool on disk


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
        CheckpointError: A model is damaged, or its result for a text is not finite.
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
    pool = _pool(run, manifest, progress)
    chooser, chosen = _search(run, pool, encoders, work_folder(manifest), progress)
    audit = audit_of(run, pool, chooser, chosen, encoders, fingerprint)
    mined = Mined.of(manifest.folder, source_split(manifest), pool, chosen.negatives)
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
        if not world.first:
            world.wait_for(_POOL)
        pool = _pool(run, manifest, progress, make=world.first)
        if world.first:
            world.signal(_POOL)
        for encoder in encoders.values():
            embed_share(pool.asked, encoder, "query", work, world, progress)
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


def _pool(
    run: RunConfig, manifest: Manifest, progress: Progress = no_progress, *, make: bool = True
) -> Pool:
    """Return the queries of cl as it was prepared and the passages.

    make: Whether to make the files if needed; the first rank has made them for the others.
    """
    folder = work_folder(manifest) / _pool_key(run, manifest)
    if make and not folder.is_dir():
        source = source_split(manifest)
        names = [source, *(["gl"] if "gl" in run.mining.passages else [])]
        held_out = [name for name in leaks.JUDGED if name in manifest.splits]
        folder.parent.mkdir(exist_ok=True)
        with writing(folder), atomic_folder(folder) as new:
            make_pool(
                new,
                read_split(manifest.folder, source),
                chain(*(read_split(manifest.folder, name) for name in names[1:])),
                chain(*(read_split(manifest.folder, name) for name in held_out)),
                progress,
                sum(manifest.records(name) for name in names),
            )
    pool = Pool(folder)
    if not pool.queries:
        place = manifest.folder
        raise DataError(f"{place}: cl holds no query, only passages; there is nothing to mine for")
    return pool


def _pool_key(run: RunConfig, manifest: Manifest) -> str:
    """Return 20 hex digits that identify the shards that passages and queries come from."""
    others = ["gl"] if "gl" in run.mining.passages else []
    names = (source_split(manifest), *others, *leaks.JUDGED)
    shards = [[shard.sha256 for shard in manifest.splits.get(name, [])] for name in names]
    plain = json.dumps([_FORMAT, lbr_ds.__version__, len(others), shards])
    return hashlib.sha256(plain.encode()).hexdigest()[:20]


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
        run.mining.model_dump_json(exclude={"model", "guide", "trust_remote_code", *TEACHERS})
    )
    models = {part: encoder.fingerprint for part, encoder in encoders.items()}
    plain = [
        _RULES,
        lbr_ds.__version__,
        run.seed,
        run.data.records_per_shard,
        run.data.near_duplicate,
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
) -> tuple[Chooser, Chosen]:
    """Rank and choose, one query after the other; return the negatives of each."""
    last = run.mining.ranks[1]
    used = {pool.folder.name}
    vectors = {part: _vectors(pool, encoder, work, progress) for part, encoder in encoders.items()}
    ranked: dict[str, Iterator[Ranking]] = {}
    for method in run.mining.methods:
        if method == "bm25":
            from lbr_ds.mining import bm25

            ranked[method] = bm25.rank(pool, last, progress)
        else:
            from lbr_ds.mining import dense

            ranked[method] = dense.rank(pool, *vectors["dense"], last, work, progress)
            used.add(dense.rank_key(pool, *vectors["dense"], last))
    guide = _VectorGuide(pool, *vectors["guide"]) if "guide" in vectors else None
    chooser = Chooser(pool, run.mining, run.seed, guide, near_duplicate=run.data.near_duplicate)
    chosen, draw = Chosen(), Random(run.seed)
    for query, rankings in enumerate(zip(*ranked.values(), strict=True)):
        chosen.add(chooser.choose(query, dict(zip(ranked, rankings, strict=True))), draw)
    used |= {part.folder.name for pair in vectors.values() for part in pair}
    _forget_others(work, used, pools_only=not encoders)
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
        embed(pool.asked, encoder, "query", work, progress),
        embed(pool.instructed, encoder, "document", work, progress),
    )


def _forget_others(work: Path, used: set[str], *, pools_only: bool) -> None:
    """Remove texts, vectors and rankings of other data or models: nothing would read them again.

    pools_only: Only texts; a search by words alone says nothing about the others.
    """
    for folder in work.iterdir():
        other = folder.name not in used and is_key(folder.name)
        if other and (not pools_only or (folder / META).is_file()):
            shutil.rmtree(folder)
