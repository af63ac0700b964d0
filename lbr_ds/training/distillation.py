"""The teacher's part in the loss of stage 2: `stage2.distillation`."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from lbr_ds.batching.contrastive import Pairs
from lbr_ds.config import DistillationConfig, RunConfig
from lbr_ds.distributed import World
from lbr_ds.errors import DataError
from lbr_ds.objectives.info_nce import NO_PREFIXES
from lbr_ds.objectives.teacher_scores import teacher_scores_loss
from lbr_ds.objectives.teacher_vectors import teacher_vectors_loss
from lbr_ds.shards import Manifest
from lbr_ds.shards.teacher import TeacherVectors


def distillation_loss(
    vectors: Tensor,
    candidates: Tensor,
    pairs: Pairs,
    world: World,
    config: DistillationConfig,
    *,
    temperature: float,
    prefixes: Mapping[int, float] = NO_PREFIXES,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the sum of the distillation losses of this rank's queries, and statistics as sums.

    Args:
        vectors: (n + n * (1 + M), D) of unit length: the queries, then their candidates.
        candidates: (C, D), those of all ranks.
        pairs: with what the teacher says about them; on the device of the vectors.
        world: this rank's place among all ranks.
        config: the loss and its temperatures.
        temperature: that of InfoNCE.
        prefixes: see `info_nce`.
    """
    n = pairs.num_queries
    student, teacher = config.temperatures(temperature)
    if config.by_vectors:
        assert pairs.teacher is not None
        return teacher_vectors_loss(
            vectors[:n],
            candidates,
            pairs.teacher[:n],
            world.gather(pairs.teacher[n:]),
            "kl" if config.loss == "batch_kl" else "cosine",
            temperature=student,
            teacher_temperature=teacher,
            prefixes=prefixes,
        )
    assert pairs.scores is not None
    return teacher_scores_loss(
        vectors[:n],
        vectors[n : 2 * n],
        vectors[2 * n :].view(n, -1, vectors.shape[1]),
        pairs.scores,
        "kl" if config.loss == "kl" else "margin_mse",
        temperature=student,
        teacher_temperature=teacher,
        prefixes=prefixes,
    )


def check_teacher(run: RunConfig, stage: int, manifest: Manifest, world: World) -> None:
    """Check that the teacher's vectors are there and unchanged. All ranks call it.

    Raises:
        DataError: They are missing or altered.
    """
    if stage != 2 or not run.stage2.distillation.by_vectors:
        return
    teacher, fault = TeacherVectors(manifest), ""
    if world.first:
        try:
            teacher.check()
        except DataError as error:
            fault = str(error)
    if fault := world.share(fault):
        raise DataError(fault)
