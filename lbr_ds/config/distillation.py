"""The section `stage2.distillation`: what a teacher contributes to the loss of stage 2."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from lbr_ds.config.section import Section


class DistillationConfig(Section):
    """Learn a teacher's scores or similarities, beside InfoNCE or in its place."""

    loss: Literal["kl", "margin_mse", "batch_kl", "batch_cosine"] | None = Field(
        default=None,
        description="kl or margin_mse: learn the scores in the records for a query's positive and "
        "hard negatives; needs num_negatives. batch_kl or batch_cosine: learn the teacher's "
        "vectors (mining.teacher_vectors) over the candidates of all ranks. Records without them "
        "only take part in InfoNCE. null: no distillation.",
    )
    weight: float = Field(default=1.0, gt=0, le=1e6, description="Weight of the distillation loss.")
    info_nce: float = Field(
        default=1.0,
        ge=0,
        le=1e6,
        description="Weight of InfoNCE beside distillation. 0: distillation alone.",
    )
    temperature: float | None = Field(
        default=None,
        ge=1e-4,
        le=100,
        description="The student's cosines are divided by this temperature. null: "
        "stage2.temperature.",
    )
    teacher_temperature: float | None = Field(
        default=None,
        ge=1e-4,
        le=1e4,
        description="The teacher's scores are divided by this temperature. 1 suits the logits of a "
        "cross-encoder and 0.02 to 0.05 the cosines of an embedder. null: 1 for scores, and the "
        "student's temperature for vectors.",
    )

    @property
    def by_scores(self) -> bool:
        """Whether the teacher is known by its scores in the records."""
        return self.loss in ("kl", "margin_mse")

    @property
    def by_vectors(self) -> bool:
        """Whether the teacher is known by its vectors beside the shards."""
        return self.loss in ("batch_kl", "batch_cosine")

    def temperatures(self, info_nce: float) -> tuple[float, float]:
        """Return the student's and the teacher's, where InfoNCE has the temperature `info_nce`."""
        student = info_nce if self.temperature is None else self.temperature
        teacher = 1.0 if self.by_scores else student
        return student, teacher if self.teacher_temperature is None else self.teacher_temperature
