"""How gradient caching reduces gradients: the same in each step of a run, and after a resume.

One reduction after all chunks of a step is faster, and needs room for a whole gradient. The two
ways add the same numbers in another order, so they differ in the last bits.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from lbr_ds.system.failures import writing
from lbr_ds.training.auto import read_record, settings_of, write_record
from lbr_ds.training.meter import free_memory

if TYPE_CHECKING:
    from lbr_ds.training.session import Session

log = logging.getLogger(__name__)
NAME = "reduction.json"  # in the folder of the stage


def one_reduction(session: Session) -> bool:
    """Return whether a step of gradient caching reduces gradients once. All ranks call it.

    This is decided at the first such step, when the rehearsal has allocated what a step needs. The
    decision is recorded, and is taken from the record by a start with the same recipe on as many
    ranks: at that time, another amount of memory may be free.
    """
    run, world, number = session.run, session.world, session.stage.number
    path, settings = run.run / f"stage{number}" / NAME, settings_of(run, number, world)
    record = world.share(read_record(path, "the reduction", settings) if world.first else None)
    if record is not None:
        return bool(record["one_reduction"])
    fits = _whole_gradient_fits(session)
    if world.first:
        with writing(path):
            write_record(path, {"one_reduction": fits}, settings)
    return fits


def _whole_gradient_fits(session: Session) -> bool:
    """Return whether an unsharded gradient takes at most half of every rank's free memory."""
    engine, world = session.engine, session.world
    need, free = engine.num_trainable * engine.dtype.itemsize, free_memory(world)
    (too_large,) = world.max(float(need > free / 2))
    log.info(
        "gradient caching: %s (a whole gradient is %.2f GiB, %.1f GiB are free)",
        "one reduction per chunk" if too_large else "one reduction per step",
        need / 2**30,
        free / 2**30,
    )
    return not too_large
