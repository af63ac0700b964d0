"""Check that stage 2 has negatives: without any its loss is 0 whatever the model predicts."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping

from lbr_ds.config import RunConfig
from lbr_ds.errors import ConfigError, DataError
from lbr_ds.shards import Manifest

log = logging.getLogger(__name__)
_CURE = (
    "raise stage2.samples_per_step, or add hard negatives with `lbr-ds mine` and set "
    "stage2.num_negatives"
)


def check_negatives(run: RunConfig, stage: int, manifest: Manifest) -> None:
    """Check that queries can have negatives, as far as recipe and data show.

    Raises:
        ConfigError: A step is one sample, and the recipe uses no hard negatives.
        DataError: The split is one record or one group, whose positives are not negatives.
    """
    if stage != 2 or run.stage2.num_negatives:
        return
    if run.stage2.samples_per_step == 1:
        raise ConfigError(
            f"stage2.samples_per_step=1 and stage2.num_negatives=0 leave no negatives; {_CURE}"
        )
    account = manifest.beside("curation.json")
    try:
        split = json.loads(account)["splits"]["cl"] if account else {}
        tied = split.get("groups") == 1 and split.get("components") == 1
    except (ValueError, KeyError, TypeError, AttributeError):
        tied = False  # the manifest decides what the data is; this file only explains it
    records = manifest.records("cl")
    if records == 1 or tied:
        what = "one record" if records == 1 else f"one group of {records} records"
        raise DataError(
            f"{manifest.place}: split cl is {what}, so no query has a negative; prepare more data, "
            "or run `lbr-ds mine` with mining.passages=[cl,gl] and set stage2.num_negatives"
        )


def warn_without_negatives(step: int, stats: Mapping[str, object], *, first: bool) -> None:
    """Log a warning when no query of a run's first step had a negative, or a teacher.

    The metrics `no_negatives` and `distilled` say for every step which share of its queries had
    none, and which share learnt from the teacher.
    """
    if first and stats.get("distilled") == 0:
        log.warning(
            "step %d: no record has what stage2.distillation learns from; write scores with "
            "`lbr-ds mine --score-with MODEL`, or vectors with --teacher-vectors MODEL",
            step,
        )
    if first and stats.get("no_negatives") == 1:
        log.warning(
            "step %d: no query has a negative (one sample, or one group), so the loss has no "
            "gradient; %s",
            step,
            _CURE,
        )
