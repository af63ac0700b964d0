"""One configuration, measured by its ranks: `loop.take_step` itself, a few times, and what it took.

Where the recipe's data is prepared the texts are its own, by the loader that training uses, and the
weights its backbone's. Else both are random: weights of the backbone's shape, and texts as long as
the recipe allows, which is also what `plan` assumes. The learning rate is 0, so no step spoils the
next one and every one costs what training's does.
"""

from __future__ import annotations

import itertools
import json
import socket
import statistics
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lbr_ds.batching import Sequence
from lbr_ds.batching.contrastive import Pairs
from lbr_ds.cluster.benchmark.traffic import bandwidth, shares
from lbr_ds.cluster.device import clock, forget_peak
from lbr_ds.cluster.flops import Sizes, causal_pairs, flops, sizes_of
from lbr_ds.cluster.plan.shape import find_shape
from lbr_ds.cluster.plan.work import work_of
from lbr_ds.cluster.synthetic import random_ids, write_backbone
from lbr_ds.config import RunConfig
from lbr_ds.distributed import World, join, leave
from lbr_ds.model.bottleneck import CARD, prepare_backbone
from lbr_ds.system.atomic import write_json
from lbr_ds.system.urls import is_url
from lbr_ds.train.deepspeed.engine import Engine
from lbr_ds.train.feed import open_feed
from lbr_ds.train.guard import Guard
from lbr_ds.train.logs import open_log
from lbr_ds.train.loop import take_step
from lbr_ds.train.meter import memory_gib
from lbr_ds.train.session import Session, build_engine, build_session, text_encoder
from lbr_ds.train.stages import STAGES, Stage, rehearse
from lbr_ds.train.watch import Watch
from lbr_ds.train.work import Work, split_into_micro_batches

WARM_UP = 3  # steps: ZeRO-3 learns the order of modules, allocators and caches fill
PROFILED = 2  # steps under the profiler, after those that are timed
_DRAWN = 2  # steps of random texts, made beforehand and taken in turns


def measure_network(run: RunConfig, row: Path) -> None:
    """The collectives' bandwidth between these ranks, into the file `row` (rank 0)."""
    world = join(run.engine.timeout_minutes)
    open_log(row.with_suffix(""), world)
    with Watch(world, run.engine.timeout_minutes) as watch:
        watch.mark(0, "measures the network")
        found = {**_place(world), "collectives": bandwidth(world)}
    _write(row, found, world)


def measure_training(run: RunConfig, number: int, row: Path, steps: int) -> None:
    """`steps` timed steps of stage `number` on these ranks, their figures into `row` (rank 0)."""
    folder = row.with_suffix("")
    world = join(run.engine.timeout_minutes)
    open_log(folder, world)
    total = WARM_UP + steps + PROFILED
    with Watch(world, run.engine.timeout_minutes) as watch:
        watch.mark(0, "starts")
        prepared = is_prepared(run)
        make = _real if prepared else _random
        session = make(run, STAGES[number], watch, total)
        session.guard = Guard(run.guard, folder, world)
        works: list[Work] = []
        session.feed = _noting(session.feed, works)

        def take() -> dict[str, Any]:
            return take_step(session, lr=0.0)

        for _ in range(WARM_UP):
            take()
        forget_peak()
        seconds, values = _timed(take, steps)
        memory = memory_gib()
        timed = works[WARM_UP : WARM_UP + steps]
        found = {
            **_place(world),
            "data": "real" if prepared else "random",
            **_figures(run, session.engine, timed, seconds, values, world),
            "memory_gib": world.max(memory)[0],
            **_shares(lambda: [take() for _ in range(PROFILED)], world),
        }
    _write(row, found, world)


def is_prepared(run: RunConfig) -> bool:
    """Whether the recipe's data stands ready, here or at a URL."""
    folder = run.data.folder
    return is_url(folder) or (Path(folder) / "manifest.json").is_file()


def _place(world: World) -> dict[str, Any]:
    """On what the ranks ran; `hosts` in the order of ranks, each once."""
    names = list(dict.fromkeys(world.collect(socket.gethostname())))
    on_gpu = world.device.type == "cuda"
    return {"device": torch.cuda.get_device_name() if on_gpu else "CPU", "hosts": names}


def _write(row: Path, found: dict[str, Any], world: World) -> None:
    if world.first:
        write_json(row, found)
    leave()


def _real(run: RunConfig, stage: Stage, watch: Watch, total: int) -> Session:
    """The recipe's backbone and its data, as `train` takes them, the rehearsal included."""
    world = watch.world
    if world.first:
        prepare_backbone(run.model, run.bottleneck, run.run / "backbone", run.seed)
    world.barrier()
    feed = open_feed(run, stage, text_encoder(run), world, start=0, stop=total)
    engine = build_engine(run, stage.number, world)
    session = build_session(run, stage.number, engine, watch, feed=feed)
    rehearse(session)
    return session


def _random(run: RunConfig, stage: Stage, watch: Watch, total: int) -> Session:
    """Random weights of the backbone's shape, once for all configurations, and random texts."""
    world, shape = watch.world, find_shape(run.model, run.bottleneck.count)
    drawn = [drawn_work(run, stage, world, shape.vocab) for _ in range(_DRAWN)]
    folder = run.run / "backbone"
    if world.first and not (folder / CARD).is_file():
        write_backbone(shape, run, folder)
    world.barrier()
    engine = build_engine(run, stage.number, world)
    steps = zip(range(total), itertools.cycle(drawn), strict=False)
    feed = (replace(work, step=step) for step, work in steps)
    return build_session(run, stage.number, engine, watch, feed=feed)


def drawn_work(run: RunConfig, stage: Stage, world: World, vocab: int) -> Work:
    """A rank's share of a step of random ids, cut as the stage cuts it (`plan.work.work_of`)."""
    told = work_of(run, stage.number, world.size)
    bottleneck, context = run.bottleneck.count, told.length - told.supervised
    sequences = [
        Sequence(
            random_ids(context, vocab),
            bottleneck,
            random_ids(told.supervised, vocab),
            cut=told.copies > 0,
        )
        for _ in range(told.sequences)
    ]
    part = run.stage(stage.number)
    budget, pairs = part.micro_batch_tokens, None
    if stage.number == 2:
        first = told.queries * world.rank  # no rank's texts are another's
        groups = first + torch.arange(told.queries)
        texts = world.rank * told.candidates + torch.arange(told.candidates)
        real = torch.ones(told.candidates, dtype=torch.bool)
        pairs = Pairs([], groups, texts[: told.queries, None], texts, real)
        if sum(map(len, sequences)) > budget:
            budget = run.stage2.chunk_tokens or budget
    batches, members = split_into_micro_batches(sequences, budget)
    return Work(0, told.queries or told.sequences, 0, batches, members, [], pairs)


def _noting(feed: Iterator[Work], works: list[Work]) -> Iterator[Work]:
    """The same, each noted as it goes by."""
    for work in feed:
        works.append(work)
        yield work


def _timed(
    take: Callable[[], dict[str, Any]], steps: int
) -> tuple[list[float], list[dict[str, Any]]]:
    """Seconds from the end of one step to the end of the next, and what each step says of itself.

    A step ends when all ranks have agreed on its sums, so these are the seconds of all ranks.
    """
    seconds, values = [], []
    begin = clock()
    for _ in range(steps):
        values.append(take())
        end = clock()
        seconds.append(end - begin)
        begin = end
    return seconds, values


def _figures(
    run: RunConfig,
    engine: Engine,
    works: list[Work],
    seconds: list[float],
    values: list[dict[str, Any]],
    world: World,
) -> dict[str, Any]:
    """Rates, waiting and the slowest rank, over the timed steps. All ranks call it."""
    shape = sizes_of(json.loads((run.run / "backbone" / "config.json").read_text()))
    rows = run.bottleneck.count * shape.hidden
    adapters = 0 if run.lora.rank is None else engine.num_trainable - rows
    every = [
        world.sum(w.num_tokens, work_flops(run, w, shape, adapters), len(w.micro_batches))
        for w in works
    ]
    tokens, useful, batches = (sum(column) for column in zip(*every, strict=True))
    rates = [told[0] / s / world.size for told, s in zip(every, seconds, strict=True)]
    low, middle, high = statistics.quantiles(rates, n=4, method="inclusive")
    waits = world.max(sum(v["data_wait_seconds"] for v in values) / len(values))[0]
    slowest = int(values[-1]["slowest_rank"])
    mean = sum(seconds) / len(seconds)
    return {
        "steps": len(works),
        "tokens_per_step": tokens / len(works),
        "micro_batches_per_rank": batches / len(works) / world.size,
        "step_seconds": mean,
        "tokens_per_second_per_rank": tokens / sum(seconds) / world.size,
        "rate_quartiles": [low, middle, high],
        "flops_per_second_per_rank": useful / sum(seconds) / world.size,
        "data_wait_share": waits / mean,
        "straggler": values[-1]["straggler"],
        "slowest_rank": slowest,
        "slowest_host": world.collect(socket.gethostname())[slowest],
    }


def work_flops(run: RunConfig, work: Work, shape: Sizes, adapters: int = 0) -> int:
    """Operations of a rank's share, strictly counted (cluster/flops.py), from what attention sees.

    A cut sequence's second segment begins with copies of B, whose pairs among each other are in
    its first one already.
    """
    tokens = pairs = scored = 0
    for batch in work.micro_batches:
        flat = batch.segments.flat
        lengths = batch.segments.starts.diff().long()
        if run.model.attention == "bidirectional":
            pairs += int((lengths * lengths).sum())
        else:
            pairs += int((lengths * (lengths + 1) // 2).sum())
        if count := run.bottleneck.count:
            pairs -= len(flat.copied) // count * causal_pairs(count)
        tokens += batch.num_tokens
        scored += len(batch.read) if batch.targets is not None else 0
    return flops(shape, tokens=tokens, pairs=pairs, scored=scored, adapters=adapters)


def _shares(run: Callable[[], object], world: World) -> dict[str, float]:
    """`traffic.shares`, averaged over ranks."""
    found = world.sum(*shares(run))
    together, alone = (value / world.size for value in found)
    return {"collective_share": together, "exposed_share": alone}
