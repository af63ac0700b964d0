"""Print a plan on a terminal, in lines of at most 100 columns."""

from __future__ import annotations

import math
import os
import shlex
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from lbr_ds.system.atomic import write_json

_WIDTH = 100


def show_plan(result: dict[str, Any], recipe: str) -> None:
    """Print each stage as a table, the recommended ds_config, and the command for stage 1."""
    console = _console()
    model, cluster = result["model"], result["cluster"]
    gpu = cluster["gpu"]
    given = model["activation_checkpointing"]
    checkpointing = given if given == "auto" else "on" if given else "off"
    trainable = ""
    if model["trainable"] < model["parameters"]:
        trainable = f", {model['trainable'] / 1e6:.1f}M trainable"
    console.print(
        f"{result['recipe']}: {model['parameters'] / 1e9:.2f}B parameters{trainable} "
        f"({model['layers']} layers of {model['hidden']}), {cluster['nodes']} x "
        f"{cluster['gpus_per_node']} {gpu['name']}, activation checkpointing {checkpointing}",
        highlight=False,
    )
    for number in (1, 2):
        _stage(console, result, number)
    for choice in result["auto"]:
        line = f"\nstage {choice['stage']}, {choice['line']}"
        console.print(line, highlight=False, markup=False)
    if result["encoding"]:
        console.print(_encoding(result["encoding"]), highlight=False, markup=False)
    console.print(_notes(result), style="dim", highlight=False)
    console.print(_verdict(result), highlight=False, markup=False)
    if result["best"]:
        console.print(_command(result, recipe), highlight=False, markup=False, soft_wrap=True)


def _stage(console: Console, result: dict[str, Any], number: int) -> None:
    """Print one stage: a line about its step, and a row for each layout."""
    shown = result["best"] or result["layouts"][0]["ds_config"]
    (row,) = (r for r in result["layouts"] if r["ds_config"] == shown)
    work = row["stages"][number - 1]["work"]
    console.print(
        f"\nstage {number}: per rank and step {work['sequences']} sequences of {work['length']} "
        f"tokens in {work['micro_batches']} micro-batch(es)"
        + (", cached gradients" if work["cached"] else ""),
        highlight=False,
    )
    given = result["model"]["activation_checkpointing"]
    other = "other" if given == "auto" else "no ckpt" if given else "ckpt"
    columns = [
        "params",
        "grads",
        "optim",
        "step",
        "peak",
        other,
        "links",
        "net",
        "s/step",
        "tok/s",
        "MFU",
        "hours",
    ]
    table = Table(
        Column("ds_config", overflow="fold", min_width=9),
        *map(_right, columns),
        box=None,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    for row in result["layouts"]:
        stage = row["stages"][number - 1]
        style = "dim" if stage["reason"] else "bold" if row["ds_config"] == result["best"] else None
        table.add_row(row["ds_config"], *_cells(stage), style=style)
    console.print(table)
    for row in result["layouts"]:
        stage, line = row["stages"][number - 1], ""
        if stage["host_gib_per_node"]:
            line = f"{stage['host_gib_per_node']:.0f} GiB per node on the host"
        if stage["reason"]:
            line = str(stage["reason"])
        if line:
            console.print(f"  {row['ds_config']}: {line}", style="dim", highlight=False)


def _cells(stage: dict[str, Any]) -> list[str]:
    memory, traffic = stage["gpu_gib"], stage["traffic_gib"]
    other = memory[f"peak_with{'out' if stage['activation_checkpointing'] else ''}_checkpointing"]
    states = memory["states"]
    kept = ("parameters", "gradients", "optimizer")
    return [
        *(f"{states.get(part, 0):.1f}" for part in kept),
        f"{memory['peak'] - sum(states.get(part, 0) for part in kept):.1f}",
        f"{memory['peak']:.1f}",
        f"{other:.0f}",
        f"{traffic['links']:.0f}",
        f"{traffic['network']:.1f}",
        f"{stage['step_seconds']:.2f}",
        f"{stage['tokens_per_second_per_gpu']:,.0f}",
        f"{stage['mfu']:.0%}",
        "?" if stage["days"] is None else f"{stage['days'] * 24:.2f}",
    ]


def _encoding(found: dict[str, Any]) -> str:
    """Return what `lbr-ds mine` takes with vectors of this model."""
    seconds = {name: _time(part / 86400) for name, part in found["seconds"].items()}
    return (
        f"\nmine with vectors of this model: {found['passages']:,} passages, {found['queries']:,} "
        f"queries,\n{found['tokens']:,} tokens each: encode {seconds['encode']} "
        f"({found['tokens_per_second_per_gpu']:,.0f} tok/s per GPU), search {seconds['search']},\n"
        f"then one rank {seconds['alone']}, with {found['first_rank_gib']:,.1f} GiB for hashes; "
        f"disk: {found['vectors_gib']:,.0f} GiB of vectors\nof {found['dimension']:,}, "
        f"{found['rankings_gib']:,.0f} of rankings, and the texts (plan/encoding.py; not measured "
        "on a GPU)"
    )


def _notes(result: dict[str, Any]) -> str:
    """Return what the columns are, and the assumptions."""
    gpu, assumed = result["cluster"]["gpu"], result["assumed"]
    peak = f"{assumed['reserve_gib']:.0f} GiB for CUDA and NCCL"
    return (
        "\nparams to peak: GiB per GPU; step: bucket, gathered parameters, activations, loss,\n"
        f"{peak}; the column after it: the peak with activation checkpointing the other way.\n"
        "links, net: GiB per GPU and step, in the node and between nodes. tok/s: per GPU.\n"
        "s/step: calibrated on one H100 at commit 8d587fb, layers not compiled (plan/pace.py).\n"
        f"Assumed: texts as long as the recipe allows, large matmuls at {gpu['matmul']:.0%} of "
        f"{gpu['tflops']:g}\nTFLOP/s, {assumed['bandwidth']:.0%} of {gpu['link']:g} GB/s links "
        f"and of {gpu['network']:g} GB/s network per GPU. MFU: strict causal count."
    )


def _verdict(result: dict[str, Any]) -> str:
    """Return one line: the layout to take, or that none fits and what to change."""
    gpu = result["cluster"]["gpu"]
    if result["best"] is None:
        least = min(
            (r for r in result["layouts"]), key=lambda r: max(_peak(s) for s in r["stages"])
        )
        peak = max(_peak(s) for s in least["stages"])
        return (
            f"Nothing fits: {least['ds_config']} comes nearest with {peak:.0f} GiB of "
            f"{gpu['memory_gib']:g}. Lower stageN.micro_batch_tokens, or take more GPUs."
        )
    row = next(r for r in result["layouts"] if r["ds_config"] == result["best"])
    peak = max(_peak(s) for s in row["stages"])
    days = [s["days"] for s in row["stages"]]
    time = "" if None in days else f", {_time(sum(days))} in total"
    own = result["recipe_layout"]
    differs = "" if own in (row["ds_config"], "auto") else f" (the recipe says {own})"
    return (
        f"Take {row['ds_config']}{differs}: the cheapest that fits, "
        f"{peak:.0f} of {gpu['memory_gib']:g} GiB{time}"
    )


def _peak(stage: dict[str, Any]) -> float:
    return float(stage["gpu_gib"]["peak"])


def _time(days: float) -> str:
    hours = days * 24
    if hours < 2:
        return f"{math.ceil(hours * 60)} minutes"
    return f"{days:.1f} days" if days >= 2 else f"{hours:.1f} hours"


def _command(result: dict[str, Any], recipe: str) -> str:
    """Return the command line that starts stage 1 with the recommended layout."""
    cluster = result["cluster"]
    per_node = cluster["gpus_per_node"]
    changed = ""
    if result["recipe_layout"] not in (result["best"], "auto"):
        changed = f"OVERRIDES=engine.ds_config={shlex.quote(result['best'])} "
    return (
        f"RECIPE={shlex.quote(recipe)} {changed}sbatch --nodes={cluster['nodes']} "
        f"--gpus-per-node={per_node} --ntasks-per-node={per_node} slurm/stage1.sbatch"
    )


def write(result: dict[str, Any], out: Path | None) -> None:
    """Write the plan as JSON if `out` is given."""
    if out is not None:
        write_json(out, result)
        print(f"written to {out}")


def _right(name: str) -> Column:
    return Column(name, justify="right", no_wrap=True)


def _console() -> Console:
    """Use the terminal's width up to 100 columns; 100 without a terminal (a pipe, a job's log)."""
    console = Console()
    known = "COLUMNS" in os.environ or console.is_terminal
    return Console(width=min(_WIDTH, console.width) if known else _WIDTH)
