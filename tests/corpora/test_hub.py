"""A dataset of the hub is read in pieces; a server on this host takes the place of the hub."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lbr_ds.config import SourceConfig
from lbr_ds.corpora.formats import interface
from lbr_ds.corpora.formats.columnar import read_hub
from lbr_ds.corpora.sources import find
from lbr_ds.errors import ConfigError, EnvironmentProblem
from lbr_ds.system import remote_files
from tests.corpora.hub_server import serving
from tests.corpora.test_remote_sources import in_pieces, parquet, plain, rows

PAIRS, LINES, BYTES = "owner/pairs", "owner/lines", 1000  # bytes of a piece and of a request
_CARD = b"""---
configs:
- {config_name: large, data_files: [{split: train, path: "large/*"}]}
- config_name: small
  data_files: [{split: train, path: "small/*"}, {split: test, path: "test/*"}]
---
"""
_READ = "import sys; from tests.corpora.test_hub import *; report(sys.argv[1]); refusals()"


def source(path: str | Path, **fields: Any) -> SourceConfig:
    columns = {"query": "question", "positives": "reply"}
    given = {"path": str(path), "name": "toy", "columns": columns, "license": "CC0", **fields}
    return SourceConfig.model_validate(given)


def report(folder: str) -> None:
    """Compare what is read of the hub with a copy of its files on disk; runs with HF_ENDPOINT."""
    interface.PIECE_BYTES = remote_files.RANGE_BYTES = BYTES
    for subset, split, place, pieces in (
        ("large", "", "large", 23),
        ("small", "train", "small/a.parquet", 2),
        ("small", "test", "test/b.parquet", 1),
    ):
        chosen = {"subset": subset, "split": split}
        corpus, copy = find(source(f"hf:{PAIRS}", **chosen)), find(source(Path(folder, place)))
        assert len(list(corpus.pieces())) == pieces
        assert plain(corpus.read()) == plain(copy.read()) == in_pieces(corpus)
        rows = [row.columns for row in read_hub(Path(), source(f"hf:{PAIRS}@main", **chosen))]
        fields = [{"question": r.query, "reply": r.positives[0]} for _, r in copy.read()]  # type: ignore[union-attr]
        assert fields == rows
        made = corpus.provenance()
        assert (made["bytes"], made["streamed"]) == (copy.size, 3 if subset == "large" else 1)
        corpus.check_unchanged()


def refusals() -> None:
    """What `datasets` reads, and what there is not; runs with HF_ENDPOINT."""
    corpus = find(source(f"hf:{LINES}"))
    assert (corpus.format, len(list(corpus.read()))) == ("hub", 3)
    with pytest.raises(ConfigError, match=r"hf:owner/pairs: Bad split: dev. Available .*test"):
        list(find(source(f"hf:{PAIRS}", subset="small", split="dev")).read())
    with pytest.raises(ConfigError, match=f"data.sources.path=hf:{PAIRS}: .*medium.*large"):
        find(source(f"hf:{PAIRS}", subset="medium"))
    with pytest.raises(EnvironmentProblem, match="hf:owner/nothing: not found on the hub"):
        find(source("hf:owner/nothing"))


def test_a_data_set_in_pieces(tmp_path: Path) -> None:
    """Its Parquet files, as its card names them, give the rows that `datasets` gives."""
    files = {f"large/part-{part}.parquet": parquet(rows(50 * part, 50)) for part in range(3)}
    files |= {"small/a.parquet": parquet(rows(200, 9)), "test/b.parquet": parquet(rows(300, 5))}
    for name, raw in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(raw)
    lines = b"".join(json.dumps(row).encode() + b"\n" for row in rows(0, 3))
    with serving() as hub:
        hub.files = {PAIRS: {**files, "README.md": _CARD}, LINES: {"few.jsonl": lines}}
        given = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")}
        command = [sys.executable, "-c", _READ, str(tmp_path)]
        subprocess.run(command, env={**os.environ, **given}, check=True)


def test_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def unreachable(name: str, *_: object, **__: object) -> None:
        raise ConnectionError(f"Couldn't reach {name}\non the Hub")

    monkeypatch.setattr(datasets, "load_dataset_builder", unreachable)
    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    message = r"hf:some/data@main: cannot be fetched{} \(Couldn't reach some/data on"
    with pytest.raises(EnvironmentProblem, match=message.format("")):
        find(source("hf:some/data@main"))
    with pytest.raises(EnvironmentProblem, match=message.format(" after row 0")):
        list(read_hub(Path(), source("hf:some/data@main")))
