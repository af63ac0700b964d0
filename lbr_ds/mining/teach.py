"""Add a teacher's scores to the records of cl, and its vectors beside the shards.

It reads cl as it is, mined or not, and writes the same records in the same order: with
`positive_scores` and `negative_scores` (`mining.score_with`), and `teacher-keys.npy` and
`teacher-vectors.npy` (`mining.teacher_vectors`). The previous cl becomes `unscored/`, from which
the next command starts, so a command has to name all teachers whose scores or vectors are wanted.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import lbr_ds
from lbr_ds.config import RunConfig
from lbr_ds.corpora.prepare import TEACHING
from lbr_ds.distributed import ALONE, World, leave
from lbr_ds.encoder import Encoder
from lbr_ds.errors import DataError
from lbr_ds.mining.mine import work_folder
from lbr_ds.mining.pairs import KEYS, Pairs, make_pairs
from lbr_ds.mining.remade import Scored
from lbr_ds.mining.rewrite import TEACH, fingerprint_before, on_ranks, rewrite
from lbr_ds.mining.teachers import Embedder, Reranker, encode, encode_share, scorer
from lbr_ds.shards import Manifest, read_split
from lbr_ds.shards.in_use import refuse_in_use
from lbr_ds.shards.teacher import teacher_vectors, write_teacher
from lbr_ds.system.atomic import atomic_folder, check_replaceable
from lbr_ds.system.failures import writing
from lbr_ds.system.progress import Progress, no_progress

log = logging.getLogger(__name__)
_RULES = 1  # increase it when the same settings would give other scores or vectors
_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
_MINED, _PAIRS = "mined", "pairs"  # events that rank 0 signals
_FORMAT = 1  # of pairs on disk


class _Teachers:
    """The models of the recipe; one name is loaded once."""

    def __init__(self, run: RunConfig) -> None:
        mining, trust = run.mining, run.mining.trust_remote_code
        self.scores: Embedder | Reranker | None = None
        self.vectors: Encoder | None = None
        if mining.score_with:
            self.scores = scorer(mining.score_with, trust_remote_code=trust)
        if mining.teacher_vectors:
            same = mining.teacher_vectors == mining.score_with and isinstance(self.scores, Embedder)
            self.vectors = (
                self.scores.encoder
                if same and isinstance(self.scores, Embedder)
                else Encoder(mining.teacher_vectors, trust_remote_code=trust)
            )

    def fingerprint(self, run: RunConfig, manifest: Manifest) -> str:
        """Return a hash of all that decides what is written."""
        models = [m.fingerprint if m else "" for m in (self.scores, self.vectors)]
        plain = [_RULES, models, run.data.records_per_shard, fingerprint_before(manifest, TEACH)]
        return hashlib.sha256(json.dumps(plain).encode()).hexdigest()[:16]


def mined(world: World) -> None:
    """Tell the other ranks that cl has its negatives; rank 0 calls it before `teach`."""
    world.signal(_MINED)


def teach(
    run: RunConfig,
    progress: Progress = no_progress,
    world: World = ALONE,
    *,
    after_mining: bool = False,
) -> dict[str, Any] | None:
    """Add the scores and vectors of `run.mining`'s teachers to cl of `run.data.folder`.

    The same data, models and settings give the same bytes, so a folder that has them already is not
    changed.

    Args:
        run: The recipe; it names a teacher.
        progress: Called with the part, what is done and the total.
        world: Its ranks share the scoring and leave the process group; the first does the rest.
        after_mining: Whether other ranks than the first wait for `mined`.

    Returns:
        The content of DATA/teacher.json and "reused"; None on other ranks than the first.

    Raises:
        ConfigError: A model's folder holds no model.
        CheckpointError: A model is damaged, or its result for a text is not finite.
        DataError: The data is missing or damaged, or cl has no query.
        EnvironmentProblem: A model cannot be loaded, the disk is full, or another process writes
            the folder.
    """
    folder = check_replaceable(run.data.local_folder)

    def share(shown: Progress) -> None:
        if after_mining and not world.first:
            world.wait_for(_MINED)
        _share(run, folder, world, shown)

    return on_ranks(folder, world, share, lambda: _teach(run, folder, progress), progress)


def _share(run: RunConfig, folder: Path, world: World, progress: Progress = no_progress) -> None:
    """Do this rank's share of the models' work, and leave the process group when all is done."""
    manifest, teachers = Manifest.load(folder.resolve()), _Teachers(run)
    if not _holds(manifest, teachers.fingerprint(run, manifest)):
        if not world.first:
            world.wait_for(_PAIRS)
        pairs, work = _pairs(manifest, make=world.first), work_folder(manifest)
        if world.first:
            world.signal(_PAIRS)
        if teachers.scores:
            teachers.scores.share(pairs, work, world, progress)
        if teachers.vectors:
            encode_share(pairs, teachers.vectors, work, world, progress)
    leave()


def _teach(run: RunConfig, folder: Path, progress: Progress) -> dict[str, Any]:
    manifest, teachers = Manifest.load(folder.resolve()), _Teachers(run)
    fingerprint = teachers.fingerprint(run, manifest)
    if _holds(manifest, fingerprint):
        log.info("%s already has the scores and vectors of this teacher, reused", folder)
        return {**json.loads((folder / TEACHING).read_bytes()), "reused": True}
    refuse_in_use(folder, ["cl"])
    pairs, work = _pairs(manifest), work_folder(manifest)
    audit: dict[str, Any] = {"fingerprint": fingerprint, "program": lbr_ds.__version__}
    scores = None
    if teachers.scores:
        scores = _whole(teachers.scores.scores(pairs, work, progress), pairs.count)
        audit["scores"] = _audit(pairs, scores, teachers.scores)
    taught = Scored.of(manifest.folder, TEACH.source_split(manifest), pairs, scores)
    write = None
    if encoder := teachers.vectors:
        queries, passages = encode(pairs, encoder, work, progress)
        dimension = queries.dimension
        blocks = (block for part in (queries, passages) for _, block in part.parts())
        audit["vectors"] = {
            "name": encoder.name,
            "fingerprint": encoder.fingerprint,
            "queries": len(pairs.queries),
            "passages": len(pairs.passages),
            "dimension": dimension,
        }

        def write(new: Path) -> None:
            write_teacher(new, pairs.keys, blocks, dimension)

    rewrite(manifest, taught, audit, run.data.records_per_shard, progress, verb=TEACH, write=write)
    teacher_vectors.cache_clear()  # this process may train next
    return {**audit, "reused": False}


def _holds(manifest: Manifest, fingerprint: str) -> bool:
    """Return whether the data already has the scores and vectors of these teachers."""
    same = TEACH.kept in manifest.splits and manifest.fingerprint.startswith(f"{fingerprint}-")
    return same and (manifest.folder / TEACHING).is_file()


def _pairs(manifest: Manifest, *, make: bool = True) -> Pairs:
    """Return the queries of cl with their passages.

    make: Whether to make the files if needed; the first rank has made them for the others.
    """
    split, work = TEACH.source_split(manifest), work_folder(manifest)
    shards = [_FORMAT, lbr_ds.__version__, *(s.sha256 for s in manifest.shards(split))]
    folder = work / hashlib.sha256(json.dumps(shards).encode()).hexdigest()[:20]
    if make and not folder.is_dir():
        work.mkdir(exist_ok=True)
        with writing(folder), atomic_folder(folder) as new:
            make_pairs(new, read_split(manifest.folder, split))
        for other in work.glob(f"*/{KEYS}"):  # of other data
            if other.parent != folder:
                shutil.rmtree(other.parent)
    pairs = Pairs(folder)
    if not len(pairs):
        raise DataError(
            f"{manifest.folder}: cl holds no query, only passages; a teacher scores passages for "
            "queries"
        )
    return pairs


def _whole(parts: Iterator[NDArray[np.float32]], count: int) -> NDArray[np.float32]:
    """Return all parts in one array, 4 bytes for each pair."""
    whole, first = np.empty(count, np.float32), 0
    for part in parts:
        whole[first : first + len(part)] = part
        first += len(part)
    assert first == count
    return whole


def _audit(
    pairs: Pairs, scores: NDArray[np.float32], teacher: Embedder | Reranker
) -> dict[str, Any]:
    """Return what the scores look like; of several positives the lowest counts."""
    rounded = np.round(scores.astype(np.float64), 6)
    ends, counts = pairs.passages_of.ends, np.asarray(pairs.positives)
    starts = np.concatenate([[0], ends[:-1]])
    owners = np.repeat(np.arange(len(pairs)), np.diff(ends, prepend=0))
    positive = np.arange(len(scores)) < (starts + counts)[owners]
    lowest = np.minimum.reduceat(np.where(positive, rounded, np.inf), starts)
    margins = (lowest[owners] - rounded)[~positive]
    above = np.unique(owners[~positive][margins < 0])
    audit: dict[str, Any] = {
        "name": teacher.name,
        "kind": teacher.kind,
        "fingerprint": teacher.fingerprint,
        "queries": len(pairs),
        "positives": int(positive.sum()),
        "negatives": len(margins),
        "queries_without_negatives": int((np.diff(ends, prepend=0) == counts).sum()),
        "negatives_above_the_positive": int((margins < 0).sum()),
        "queries_with_a_negative_above": len(above),
        "mean_positive_score": round(float(rounded[positive].mean()), 4),
    }
    if len(margins):
        quantiles = np.quantile(margins, _QUANTILES)
        names = [f"p{round(100 * q)}" for q in _QUANTILES]
        audit["margins"] = {
            name: round(float(value), 4) for name, value in zip(names, quantiles, strict=True)
        }
    return audit
