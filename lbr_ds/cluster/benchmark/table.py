"""A sweep's rows -> RESULT.md: a table that reads as plain text too, and what its columns are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

_MIB = 1 << 20
_COLUMNS = """\
tokens/s: of a rank, over the timed steps. MFU: model FLOPs by the strict count (every weight once a
token, the head on scored rows alone, attention on the pairs that the rule allows, nothing that is
recomputed, no gradients of frozen weights) over the GPU's dense bf16 peak. GiB: the most that the
fullest rank's tensors took in these steps; of a CPU rank all that is resident. data wait,
collectives, exposed: shares of a step's time; waiting for the loader on the rank that waited
longest; gloo's or NCCL's collectives, waiting for slower ranks in them included (two further steps
under torch's profiler, mean of ranks); those with no computation beside them. weak, strong: a
rank's rate over that on the fewest ranks with as many samples a rank, or a step. straggler: the
fastest rank's own seconds over the slowest one's. After a slash: what `lbr-ds plan` says, for texts
as long as the recipe allows."""


def markdown(result: dict[str, Any]) -> str:
    """Heading, the table of training, the failures, the network's table, the columns' meaning."""
    settings, rows = result["settings"], result["rows"]
    training = [row for row in rows if row["kind"] == "training"]
    measured = [row["figures"] for row in rows if row["figures"]]
    devices = sorted({found["device"] for found in measured})
    hosts = {host for found in measured for host in found["hosts"]}
    data = {found["data"] for found in measured if "data" in found}
    told = {
        "real": "the recipe's prepared data, by its loader",
        "random": "random weights, and random texts as long as the recipe allows",
    }
    parts = [
        f"# {settings['recipe']}, stage {settings['stage']}, on {len(hosts)} host(s) of "
        f"{', '.join(devices) or 'unknown devices'}",
        f"Texts: {'; '.join(told[d] for d in sorted(data)) or 'none was read'}. "
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
    """A row of training; one that failed has its plan alone."""
    found, plan = row["figures"] or {}, row["planned"] or {}

    def both(key: str, form: Callable[[float], str], measured: float | None = None) -> str:
        value = found.get(key) if measured is None else measured
        told = "-" if value is None else form(value)
        return f"{told} / {form(plan[key])}" if key in plan else told

    def alone(value: float | None, form: Callable[[float], str]) -> str:
        return "-" if value is None else form(value)

    rate = both("tokens_per_second_per_rank", "{:,.0f}".format)
    wait = found.get("data_wait_share") if found.get("data") == "real" else None
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
        alone(found.get("collective_share"), "{:.1%}".format),
        both("exposed_share", "{:.1%}".format),
        alone(row["weak"], "{:.2f}".format),
        alone(row["strong"], "{:.2f}".format),
        alone(found.get("straggler"), "{:.2f}".format),
    ]


def _network(rows: list[dict[str, Any]]) -> str:
    """GB/s that a rank receives, for each size and number of ranks."""
    cells = []
    for row in rows:
        rates: dict[float, dict[str, float]] = {}
        for found in row["figures"]["collectives"]:
            size = round(found["bytes"] / _MIB)
            rates.setdefault(size, {})[found["collective"]] = found["gb_per_second"]
        for size, both in rates.items():
            told = [f"{both[name]:.3g}" for name in ("all_gather", "reduce_scatter")]
            cells.append([str(row["ranks"]), f"{size}", *told])
    table = _table(["ranks", "MiB", "all-gather GB/s", "reduce-scatter GB/s"], cells)
    return (
        f"Over all ranks, S (N-1)/N bytes of a whole of S over the slowest rank's time:\n\n{table}"
    )


def _table(head: list[str], rows: list[list[str]]) -> str:
    """Markdown with its columns in line, figures to the right."""
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
