"""Rooms import in one direction, heavy libraries through one door, sizes within the budget."""

from __future__ import annotations

import ast
import re
from functools import lru_cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "lbr_ds"
# A room may import those before it.
ORDER = [
    "errors",
    "system",
    "instructions",
    "records",
    "runs",
    "config",
    "shards",
    "lineage",
    "corpora",
    "objectives",
    "plan",
    "batching",
    "model",
    "encoder",
    "distributed",
    "evaluation",
    "training",
    "exporting",
    "merging",
    "trade",
    "mining",
    "synthesis",
    "report",
    "reproduce",
    "cluster",
    "bench",
    "demo",
    "api",
    "examples",
    "cli",
    "__main__",
]
# Rooms that may import torch when they are imported.
TORCH = {
    "objectives",
    "batching",
    "model",
    "encoder",
    "distributed",
    "evaluation",
    "training",
    "exporting",
    "merging",
    "trade",
    "mining",
    "synthesis",
    "cluster",
    "bench",
    "examples",
    "__main__",
}
NO_TORCH_INSIDE = ("objectives/head_chunk.py", "model/attention_costs.py")
NO_TORCH = [name for name in ORDER if name not in TORCH]
DOORS = {
    "onnx": {"exporting/onnx_graph.py"},
    "onnxruntime": {"exporting/onnx_graph.py"},
    "deepspeed": {"training/deepspeed"},
    "tensorboard": {"training/trackers.py"},
    "accelerate": {"training/trackers.py"},
    "wandb": {"training/trackers.py"},
    "peft": {"model/lora.py"},
    "webdataset": {"shards", "bench"},  # bench: the peer that the loader is measured against
    "mteb": {"evaluation"},
    "bm25s": {"mining/bm25.py"},
    "requests": {"synthesis/endpoint.py"},
    "datatrove": {"corpora/engine.py"},
    "duckdb": {"corpora/store.py"},
    "datasets": {"corpora", "evaluation"},  # evaluation: the types that mteb takes
    "yaml": {"system/yaml_json.py", "config/recipe.py", "exporting/card.py"},
}
FORBIDDEN = {
    ("evaluation", "training"),
    ("model", "distributed"),
    ("batching", "shards"),
    ("mining", "training"),
    ("mining", "evaluation"),
    ("synthesis", "training"),
    ("synthesis", "evaluation"),
}
MAX_FILE, MAX_FUNCTION = 350, 60


@lru_cache(maxsize=1)
def modules() -> list[tuple[Path, ast.Module]]:
    return [(p, ast.parse(p.read_text())) for p in sorted(PACKAGE.rglob("*.py"))]


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(tree: ast.AST) -> list[str]:
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


def test_rooms_import_in_one_direction() -> None:
    wrong = []
    for path, tree in modules():
        if (mine := room(path)) == "__init__":
            continue
        for name in imports(tree):
            parts = name.split(".")
            if parts[0] != "lbr_ds" or len(parts) < 2 or parts[1] in ("__version__", mine):
                continue
            if ORDER.index(parts[1]) > ORDER.index(mine) or (mine, parts[1]) in FORBIDDEN:
                wrong.append(f"{path.relative_to(PACKAGE)} imports {name}")
    assert not wrong


def test_parts_of_the_cluster_room_import_in_one_direction() -> None:
    order = ["device", "synthetic", "gpu_check", "doctor", "benchmark"]
    wrong = []
    for path, tree in modules():
        if room(path) == "cluster" and path.parent != PACKAGE and path.name != "__init__.py":
            mine = path.relative_to(PACKAGE).parts[1].removesuffix(".py")
            parts = [n.split(".")[2] for n in imports(tree) if n.startswith("lbr_ds.cluster.")]
            wrong += [f"{path.name}: {p}" for p in parts if order.index(p) > order.index(mine)]
    assert not wrong


def test_the_package_does_not_import_tests() -> None:
    assert not [
        f"{path.relative_to(PACKAGE)}: {name}"
        for path, tree in modules()
        for name in imports(tree)
        if name.split(".")[0] == "tests"
    ]


@pytest.mark.parametrize("library", DOORS)
def test_heavy_libraries_have_one_door(library: str) -> None:
    wrong = []
    for path, tree in modules():
        inside = str(path.relative_to(PACKAGE))
        if any(inside == door or inside.startswith(f"{door}/") for door in DOORS[library]):
            continue
        names = (name for name in imports(tree) if not name.startswith("lbr_ds."))
        if any(library in name.split(".") for name in names):
            wrong.append(inside)
    assert not wrong


def test_light_rooms_do_not_import_torch() -> None:
    """At module level; a verb may import it when it runs."""
    wrong = []
    for path, tree in modules():
        inside = str(path.relative_to(PACKAGE))
        if room(path) in NO_TORCH or inside.startswith(NO_TORCH_INSIDE):
            top = ast.Module([n for n in tree.body if not isinstance(n, ast.FunctionDef)], [])
            heavy = ("torch", "transformers", "deepspeed", "mteb")
            wrong += [f"{path.name}: {n}" for n in imports(top) if n.split(".")[0] in heavy]
    assert not wrong


def test_sizes() -> None:
    too_long = []
    for path, tree in modules():
        if (lines := len(path.read_text().splitlines())) > MAX_FILE:
            too_long.append(f"{path.name}: {lines} lines")
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                length = (node.end_lineno or 0) - node.lineno + 1
                if length > MAX_FUNCTION:
                    too_long.append(f"{path.name} {node.name}: {length} lines")
    assert not too_long


def test_source_is_ascii() -> None:
    for path, _ in modules():
        assert path.read_text().isascii(), path


def test_the_map_names_every_room_in_this_order() -> None:
    """lbr_ds/README.md is the map; `recipes` and `templates` hold no code."""
    text = (PACKAGE / "README.md").read_text()
    table = text[text.index("| room |") : text.index("## Read these first")]
    names = [name.removesuffix(".py").rstrip("/") for name in re.findall(r"`([\w.]+/?)`", table)]
    rooms = [name for name in names if name in ORDER]
    assert rooms == [name for name in ORDER if name != "__main__"]
