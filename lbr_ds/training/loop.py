"""The training loop: one stage of one run, from its newest checkpoint to its last step."""

from __future__ import annotations

import time

from lbr_ds.config import RunConfig
from lbr_ds.distributed import join
from lbr_ds.training.auto import halve, rehearsed
from lbr_ds.training.held_out import evaluate, evaluate_resumed, patience_exhausted
from lbr_ds.training.meter import memory_gib
from lbr_ds.training.negatives import warn_without_negatives
from lbr_ds.training.optim import learning_rate
from lbr_ds.training.session import Session
from lbr_ds.training.setup import open_session
from lbr_ds.training.watch import SAVES, stragglers

Metrics = dict[str, float | list[float]]  # a list has one number per rank


def train(run: RunConfig, number: int, *, force: bool = False) -> bool:
    """Train stage `number`, resuming from its newest checkpoint if there is one.

    The ranks stay joined. An error leaves the last checkpoint as it is and issues no collectives,
    since another rank may be gone.

    Args:
        run: The recipe.
        number: 1 or 2.
        force: Resume even if the recipe or the data changed.

    Returns:
        Whether the stage has ended: at its last step, or earlier by `stage2.patience`. False: a
        signal stopped it, and it was saved.
    """
    complete = _train(run, number, force=force)
    if complete is None:
        halve(run, number, join(run.engine.timeout_minutes))
        complete = _train(run, number, force=force)
    return bool(complete)


def _train(run: RunConfig, number: int, *, force: bool) -> bool | None:
    """Train as `train` does. Return None if an automatic micro-batch is to be halved first."""
    with open_session(run, number, force=force) as session:
        stopped = not evaluate_resumed(session)
        ended = not stopped and (
            session.step >= session.num_steps or patience_exhausted(session, checkpoint_due=True)
        )
        if not (ended or stopped) and not rehearsed(session, run):
            session.engine.close()
            return None
        while not (ended or stopped):
            lr = learning_rate(session.step, session.num_steps, session.config.optim)
            metrics = take_step(session, lr)
            warn_without_negatives(session.step, metrics, first=session.step == session.start + 1)
            session.saver.poll()
            session.meter.log(session.step, {**metrics, "save_seconds": session.saver.seconds})
            ended = session.step == session.num_steps
            due = ended or session.step % run.every.save == 0
            figures = evaluate(session, checkpoint_due=due)
            # A stage whose evaluation was prevented has not ended: it resumes with this evaluation.
            evaluated = figures is not None
            ended = evaluated and (ended or patience_exhausted(session, checkpoint_due=due))
            stopped = session.preemption.agreed()
            if due or stopped or ended:
                session.watch.mark(session.step, SAVES)
                counters = {**session.guard.state_dict(), "unevaluated": not evaluated}
                session.saver.save(session.step, counters, figures)
    return ended


def take_step(session: Session, lr: float) -> Metrics:
    """Take one optimizer step: wait for data, forward and backward, update. Return its metrics."""
    world, watch, guard = session.world, session.watch, session.guard
    began = time.perf_counter()
    watch.mark(watch.step + 1, "waits for data")
    work = next(session.feed)
    waited = time.perf_counter() - began
    watch.mark(work.step + 1, "computes gradients")
    totals = session.stage.forward_backward(session, work)
    watch.mark(work.step + 1, "updates weights")
    stats: Metrics = {}

    def accept(norm: float, sums: list[float]) -> bool:
        found = totals.stats(sums)
        stats.update(found)
        return guard.accepts(found["loss"], norm)

    norm, applied = session.engine.step(lr, accept, totals.sums)
    seconds = time.perf_counter() - began
    ranks = [float(own) for (own,) in world.exchange(watch.own_seconds(seconds))]
    counts = totals.counts
    guard.record(work, applied, counts.skipped, session.run.data.folder, session.splits)
    session.step = work.step + 1
    return {
        **stats,
        "grad_norm": norm,
        "lr": lr,
        "samples": session.step * session.config.samples_per_step,
        "skipped": counts.skipped,
        "skipped_samples": guard.samples,
        "skipped_updates": guard.total,
        "tokens_per_second": counts.tokens / seconds,
        "samples_per_second": counts.samples / seconds,
        "step_seconds": seconds,
        "data_wait_seconds": waited,
        "memory_gib": memory_gib(),
        **stragglers(ranks),
    }
