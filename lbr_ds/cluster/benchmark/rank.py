"""Measure one configuration on its ranks, with the training step itself (`loop.take_step`).

If the recipe's data is prepared, the texts come from it through the loader of training, and the
weights are the backbone's. Otherwise both are random: weights of the backbone's shape, and texts as
long as the recipe allows, as `plan` assumes too. The learning rate is 0, so the model stays the
same, and every step costs what a step of training costs.
"""

from __future__ import annotations

import itertools
import json
import logging
import socket
import statistics
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lbr_ds.batching import Sequence
from lbr_ds.batching.contrastive import Pairs
from lbr_ds.cluster.benchmark.traffic import bandwidth, collective_shares
from lbr_ds.cluster.device import clock, reset_peak_memory
from lbr_ds.cluster.synthetic import random_ids, write_backbone
from lbr_ds.config import RunConfig
from lbr_ds.distributed import World, join, leave
from lbr_ds.model.bottleneck import CARD, prepare_backbone
from lbr_ds.plan.flops import Sizes, causal_pairs, flops, sizes_of
from lbr_ds.plan.shape import find_shape
from lbr_ds.plan.work import work_of
from lbr_ds.system.atomic import write_json
from lbr_ds.system.urls import is_url
from lbr_ds.training.auto import settle
from lbr_ds.training.deepspeed.engine import Engine
from lbr_ds.training.feed import open_feed
from lbr_ds.training.guard import Guard
from lbr_ds.training.logs import open_log
from lbr_ds.training.loop import take_step
from lbr_ds.training.meter import memory_gib
from lbr_ds.training.session import Session, build_engine, build_session, text_tokenizer
from lbr_ds.training.stages import STAGES, Stage, rehearse
from lbr_ds.training.watch import Watch
from lbr_ds.training.work import Work, split_into_micro_batches

log = logging.getLogger(__name__)
WARM_UP = 3  # steps: ZeRO-3 records the order of modules, allocators and caches fill
PROFILED = 2  # steps under the profiler, after those that are timed
_DRAWN = 2  # steps of random texts, made beforehand and used alternately


def measure_network(run: RunConfig, row: Path) -> None:
    """Measure the bandwidth of collectives between these ranks; rank 0 writes the file `row`."""
    world = join(run.engine.timeout_minutes)
    open_log(row.with_suffix(""), world)
    with Watch(world, run.engine.timeout_minutes) as watch:
        watch.mark(0, "measures the network")
        figures = {**_hosts(world), "collectives": bandwidth(world)}
    _write(row, figures, world)


def measure_training(run: RunConfig, number: int, row: Path, steps: int) -> None:
    """Time `steps` steps of stage `number` on these ranks; rank 0 writes the file `row`."""
    folder = row.with_suffix("")
    world = join(run.engine.timeout_minutes)
    open_log(folder, world)
    total = WARM_UP + steps + PROFILED
    with Watch(world, run.engine.timeout_minutes) as watch:
        watch.mark(0, "starts")
        prepared = is_prepared(run)
        make = _session_on_data if prepared else _session_on_random_texts
        session = make(run, STAGES[number], watch, total)
        session.guard = Guard(run.guard, folder, world)
        works: list[Work] = []
        session.feed = _recorded(session.feed, works)

        def take() -> dict[str, Any]:
            return take_step(session, lr=0.0)

        for _ in range(WARM_UP):
            take()
        reset_peak_memory()
        seconds, values = _timed(take, steps)
        memory = memory_gib()
        timed = works[WARM_UP : WARM_UP + steps]
        figures = {
            **_hosts(world),
            "data": "real" if prepared else "random",
            "ds_config": session.run.engine.ds_config,
            "micro_batch_tokens": session.config.micro_tokens,
            **_figures(run, session.engine, timed, seconds, values, world),
            "memory_gib": world.max(memory)[0],
            **_mean_shares(lambda: [take() for _ in range(PROFILED)], world),
        }
    _write(row, figures, world)


def is_prepared(run: RunConfig) -> bool:
    """Return whether the recipe's data is prepared, on this disk or behind a URL."""
    folder = run.data.folder
    return is_url(folder) or (Path(folder) / "manifest.json").is_file()


def _hosts(world: World) -> dict[str, Any]:
    """Return the device, and the hosts in the order of ranks, each once."""
    names = list(dict.fromkeys(world.collect(socket.gethostname())))
    on_gpu = world.device.type == "cuda"
    return {"device": torch.cuda.get_device_name() if on_gpu else "CPU", "hosts": names}


def _write(row: Path, figures: dict[str, Any], world: World) -> None:
    if world.first:
        write_json(row, figures)
    leave()


def _session_on_data(run: RunConfig, stage: Stage, watch: Watch, total: int) -> Session:
    """Build a session on the recipe's backbone and data as `train` does, with the rehearsal."""
    world = watch.world
    if world.first:
        prepare_backbone(run.model, run.bottleneck, run.run / "backbone", run.seed)
    world.barrier()
    run, layout = settle(run, stage.number, world, record=False)
    feed = open_feed(run, stage, text_tokenizer(run), world, start=0, stop=total)
    engine = build_engine(run, stage.number, world, layout=layout)
    session = build_session(run, stage.number, engine, watch, feed=feed)
    rehearse(session)
    return session


def _session_on_random_texts(run: RunConfig, stage: Stage, watch: Watch, total: int) -> Session:
    """Build a session on random weights, stored once for all configurations, and random texts."""
    world, shape = watch.world, find_shape(run.model, run.bottleneck.count)
    run, layout = settle(run, stage.number, world, record=False)
    drawn = [random_work(run, stage, world, shape.vocab) for _ in range(_DRAWN)]
    folder = run.run / "backbone"
    if world.first and not (folder / CARD).is_file():
        write_backbone(shape, run, folder)
    world.barrier()
    engine = build_engine(run, stage.number, world, layout=layout)
    steps = zip(range(total), itertools.cycle(drawn), strict=False)
    feed = (replace(work, step=step) for step, work in steps)
    return build_session(run, stage.number, engine, watch, feed=feed)


def random_work(run: RunConfig, stage: Stage, world: World, vocab: int) -> Work:
    """Return a rank's share of a step on random token ids, of the sizes that the plan assumes."""
    planned = work_of(run, stage.number, world.size)
    bottleneck, context = run.bottleneck.count, planned.length - planned.supervised
    sequences = [
        Sequence(
            random_ids(context, vocab),
            bottleneck,
            random_ids(planned.supervised, vocab),
            cut=planned.copies > 0,
        )
        for _ in range(planned.sequences)
    ]
    part = run.stage(stage.number)
    budget, pairs = part.micro_tokens, None
    if stage.number == 2:
        first = planned.queries * world.rank  # the texts of all ranks differ
        groups = first + torch.arange(planned.queries)
        texts = world.rank * planned.candidates + torch.arange(planned.candidates)
        real = torch.ones(planned.candidates, dtype=torch.bool)
        pairs = Pairs([], groups, texts[: planned.queries, None], texts, real)
        if sum(map(len, sequences)) > budget:
            budget = run.stage2.chunk_tokens or budget
    batches, members = split_into_micro_batches(sequences, budget)
    return Work(0, planned.queries or planned.sequences, 0, batches, members, [], pairs)


def _recorded(feed: Iterator[Work], works: list[Work]) -> Iterator[Work]:
    """Yield the same, and append each to `works`."""
    for work in feed:
        works.append(work)
        yield work


def _timed(
    take: Callable[[], dict[str, Any]], steps: int
) -> tuple[list[float], list[dict[str, Any]]]:
    """Return the seconds from the end of one step to the end of the next, and each step's values.

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
    """Return rates, waiting times and the slowest rank, over the timed steps. All ranks call it."""
    count = _flops_counter(run, engine)
    every = [world.sum(w.num_tokens, count(w), len(w.micro_batches)) for w in works]
    tokens, useful, batches = (sum(column) for column in zip(*every, strict=True))
    rates = [row[0] / s / world.size for row, s in zip(every, seconds, strict=True)]
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
        "flops_per_second_per_rank": useful / sum(seconds) / world.size or None,
        "data_wait_share": waits / mean,
        "straggler": values[-1]["straggler"],
        "slowest_rank": slowest,
        "slowest_host": world.collect(socket.gethostname())[slowest],
    }


def _flops_counter(run: RunConfig, engine: Engine) -> Callable[[Work], int]:
    """Return a function that counts the FLOPs of a rank's share of a step.

    It returns 0 for a backbone whose config.json names its sizes otherwise than Llama's, as that of
    GPT-2 does: plan/flops.py cannot count for it.
    """
    config = json.loads((run.run / "backbone" / "config.json").read_text())
    try:
        shape = sizes_of(config)
    except KeyError as error:
        log.warning("FLOPs are not counted: config.json of the backbone has no %s", error)
        return lambda work: 0
    rows = run.bottleneck.count * shape.hidden
    adapters = 0 if run.lora.rank is None else engine.num_trainable - rows
    return lambda work: work_flops(run, work, shape, adapters)


def work_flops(run: RunConfig, work: Work, shape: Sizes, adapters: int = 0) -> int:
    """Return the FLOPs of a rank's share by the strict count of plan/flops.py.

    The second segment `[B ; Y]` of a sequence begins with copies of B; the pairs among them are
    counted in the first segment already.
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


def _mean_shares(run: Callable[[], object], world: World) -> dict[str, float]:
    """Return `traffic.collective_shares`, averaged over ranks."""
    sums = world.sum(*collective_shares(run))
    together, alone = (value / world.size for value in sums)
    return {"collective_share": together, "exposed_share": alone}
