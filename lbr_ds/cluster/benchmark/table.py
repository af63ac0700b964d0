"""Write RESULT.md from a sweep's rows: tables that are aligned as plain text too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

_MIB = 1 << 20
_COLUMNS = """\
tokens/s: per rank, over the timed steps. MFU: model FLOPs by the strict count (every weight once a
token, the head only on rows with a loss, attention only on the pairs that the rule allows, no
recomputation, no gradients of frozen weights) over the GPU's dense bf16 peak. GiB: peak memory of
the tensors of the rank with the largest peak; on a CPU its resident memory. data wait, collectives,
exposed: shares of a step's time; waiting for the loader on the rank that waited longest; gloo's or
NCCL's collectives, with waiting for slower ranks in them (two further steps under torch's profiler,
mean over ranks); those without computation at the same time. weak, strong: a rank's rate over that
on the fewest ranks with the same samples per rank, or per step. straggler: the fastest rank's own
seconds over the slowest one's. After a slash: what `lbr-ds plan` predicts for texts as long as the
recipe allows."""


def markdown(result: dict[str, Any]) -> str:
    """Return the heading, the table of training, failures, the network's table, and the columns."""
    settings, rows = result["settings"], result["rows"]
    training = [row for row in rows if row["kind"] == "training"]
    measured = [row["figures"] for row in rows if row["figures"]]
    devices = sorted({figures["device"] for figures in measured})
    hosts = {host for figures in measured for host in figures["hosts"]}
    data = {figures["data"] for figures in measured if "data" in figures}
    sources = {
        "real": "the recipe's prepared data, by its loader",
        "random": "random weights, and random texts as long as the recipe allows",
    }
    parts = [
        f"# {settings['recipe']}, stage {settings['stage']}, on {len(hosts)} host(s) of "
        f"{', '.join(devices) or 'unknown devices'}",
        f"Texts: {'; '.join(sources[d] for d in sorted(data)) or 'none was read'}. "
        f"{settings['steps']} timed steps a row, after three.",
        _table(_HEAD, [_cells(row) for row in training]),
    ]
    if failed := [row for row in rows if row["reason"]]:
        parts.append("\n".join(f"- {row['measure']} failed: {row['reason']}" for row in failed))
    if network := [row for row in rows if row["kind"] == "network" and row["figures"]]:
        parts.append(_network(network))
    parts += ["![the same as curves](result.png)", _COLUMNS]
    return "\n\n".join(parts) + "\n"


_HEAD = [
    "ranks",
    "tokens",
    "ds_config",
    "samples",
    "tokens/s",
    "MFU",
    "GiB",
    "s/step",
    "data wait",
    "collectives",
    "exposed",
    "weak",
    "strong",
    "straggler",
]


def _cells(row: dict[str, Any]) -> list[str]:
    """Return a row of training; a failed one has only its plan."""
    figures, plan = row["figures"] or {}, row["planned"] or {}

    def both(key: str, form: Callable[[float], str], measured: float | None = None) -> str:
        value = figures.get(key) if measured is None else measured
        text = "-" if value is None else form(value)
        return f"{text} / {form(plan[key])}" if key in plan else text

    def alone(value: float | None, form: Callable[[float], str]) -> str:
        return "-" if value is None else form(value)

    rate = both("tokens_per_second_per_rank", "{:,.0f}".format)
    wait = figures.get("data_wait_share") if figures.get("data") == "real" else None
    return [
        str(row["ranks"]),
        str(row["micro_batch_tokens"]),
        row["ds_config"],
        str(row["samples"]),
        f"failed{rate[1:]}" if row["reason"] else rate,
        both("mfu", "{:.1%}".format, row["mfu"]),
        both("memory_gib", "{:.2f}".format),
        both("step_seconds", "{:.3g}".format),
        alone(wait, "{:.1%}".format),
        alone(figures.get("collective_share"), "{:.1%}".format),
        both("exposed_share", "{:.1%}".format),
        alone(row["weak"], "{:.2f}".format),
        alone(row["strong"], "{:.2f}".format),
        alone(figures.get("straggler"), "{:.2f}".format),
    ]


def _network(rows: list[dict[str, Any]]) -> str:
    """Return a table of the GB/s that a rank receives, by size and number of ranks."""
    cells = []
    for row in rows:
        rates: dict[float, dict[str, float]] = {}
        for measured in row["figures"]["collectives"]:
            size = round(measured["bytes"] / _MIB)
            rates.setdefault(size, {})[measured["collective"]] = measured["gb_per_second"]
        for size, both in rates.items():
            both_rates = [f"{both[name]:.3g}" for name in ("all_gather", "reduce_scatter")]
            cells.append([str(row["ranks"]), f"{size}", *both_rates])
    table = _table(["ranks", "MiB", "all-gather GB/s", "reduce-scatter GB/s"], cells)
    return (
        f"Over all ranks, S (N-1)/N bytes of a tensor of S over the slowest rank's time:\n\n{table}"
    )


def _table(head: list[str], rows: list[list[str]]) -> str:
    """Return a markdown table with aligned columns, figures on the right."""
    widths = [max(len(line[i]) for line in [head, *rows]) for i in range(len(head))]
    text = {i for i, name in enumerate(head) if name == "ds_config"}
    lines = [
        [
            c.ljust(w) if i in text else c.rjust(w)
            for i, (c, w) in enumerate(zip(line, widths, strict=True))
        ]
        for line in [head, *rows]
    ]
    rule = ["-" * w if i in text else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    return "\n".join(f"| {' | '.join(line)} |" for line in [lines[0], rule, *lines[1:]])
