"""Whatever goes wrong, whoever raises it, becomes one line with a cure and its exit code."""

from __future__ import annotations

import contextlib
import errno
import gzip
import json
import logging
import os
import pathlib
import sqlite3
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow.parquet
import pytest
import torch
import yaml
from safetensors import safe_open
from tokenizers import Tokenizer

from lbr_ds.distributed import ALONE
from lbr_ds.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    EnvironmentProblem,
    InternalError,
    LbrError,
    short,
)
from lbr_ds.system.failures import as_lbr_error, reading, writing
from lbr_ds.system.resources import find_shipped
from lbr_ds.training.watch import Watch
from tests.ranks import run_cli
from tests.system.test_full_disks import command


def raised(work: Callable[[], Any]) -> Exception:
    """What `work` raises."""
    try:
        work()
    except Exception as error:
        return error
    raise AssertionError("nothing was raised")


def copied_error() -> None:
    import shutil

    raise shutil.Error([("a", "there/b", "[Errno 28] No space left on device: 'there/b'")])


def out_of_pages() -> None:
    with contextlib.closing(sqlite3.connect(":memory:")) as db:
        db.execute("PRAGMA max_page_count = 1")
        db.execute("CREATE TABLE a (b)")


def onto_a_full_disk() -> None:
    duckdb.execute("COPY (FROM range(1000000)) TO '/dev/full' (FORMAT csv)")


def beyond_memory() -> None:
    with duckdb.connect(config={"memory_limit": "2MB", "temp_directory": ""}) as db:
        db.execute("SELECT count(DISTINCT hash(range)) FROM range(10000000)")


JUNK = "junk.bin"  # a file of bytes that are nothing
LIBRARIES: dict[str, tuple[Callable[[], Any], type[LbrError], str]] = {
    "safetensors": (lambda: safe_open(JUNK, "pt"), CheckpointError, "a weights file"),
    "numpy": (lambda: np.linalg.inv(np.zeros((2, 2))), CheckpointError, "vectors"),
    "pyarrow": (lambda: pyarrow.parquet.read_table(JUNK), DataError, "Parquet"),
    "zip": (lambda: zipfile.ZipFile(JUNK), DataError, "zip file"),
    "tar": (lambda: tarfile.open(JUNK).close(), DataError, "tar file"),
    "json": (lambda: json.loads("{"), DataError, "JSON"),
    "yaml": (lambda: yaml.safe_load("{"), ConfigError, "YAML"),
    "unicode": (lambda: b"\xff".decode(), DataError, "UTF-8"),
    "the terminal": (lambda: "é".encode("ascii"), EnvironmentProblem, "set PYTHONIOENCODING=utf-8"),
    "recursion": (lambda: json.loads("[" * 100_000), InternalError, "probably a bug in lbr-ds"),
    "overflow": (lambda: int(float("inf")), InternalError, "probably a bug in lbr-ds"),
    "gzip's end": (lambda: gzip.decompress(gzip.compress(b"x" * 99)[:-9]), DataError, "too early"),
    "memory": (lambda: bytearray(1 << 60), EnvironmentProblem, "micro_batch_tokens"),
    "torch's memory": (lambda: torch.empty(1 << 55), EnvironmentProblem, "micro_batch_tokens"),
    "a copied folder": (copied_error, EnvironmentProblem, "there/b: no space is left"),
    "duckdb": (lambda: duckdb.connect(JUNK), EnvironmentProblem, "the work file"),
    "duckdb's disk": (onto_a_full_disk, EnvironmentProblem, "no space is left on the disk"),
    "duckdb's memory": (beyond_memory, EnvironmentProblem, "not enough memory"),
    "sqlite": (out_of_pages, EnvironmentProblem, "no space is left on the disk"),
    "no file": (lambda: Path("nowhere").read_text(), EnvironmentProblem, "nowhere: no such file"),
    "a folder": (lambda: Path(".").read_text(), EnvironmentProblem, "a folder where a file"),
    "a long name": (lambda: Path("x" * 999).read_text(), EnvironmentProblem, "name is too long"),
}


@pytest.mark.parametrize("name", LIBRARIES)
def test_an_error_of_a_library_is_named(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work, kind, words = LIBRARIES[name]
    (tmp_path / JUNK).write_bytes(b"\x07junk" * 99)
    monkeypatch.chdir(tmp_path)
    found = as_lbr_error(raised(work))
    assert type(found) is kind, found
    assert words in str(found)
    assert "; " in str(found)  # the cure
    assert "\n" not in str(found)
    assert len(str(found)) < 600


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EIO, 9999])
def test_the_system_is_quoted_with_file_and_cure(number: int) -> None:
    found = as_lbr_error(OSError(number, os.strerror(number), "a/b"))
    assert str(found).startswith("a/b: ")
    assert found.exit_code == 6
    nameless = OSError(number, os.strerror(number))
    kind = CheckpointError if number != 9999 else OSError
    with pytest.raises(kind) as caught, writing("a/c", CheckpointError):
        raise nameless
    if number in (errno.ENOSPC, errno.EROFS, errno.EIO):
        assert str(caught.value).startswith("a/c: ")


@pytest.mark.parametrize("error", [KeyError("x"), TypeError("y"), Exception("of tokenizers")])
def test_what_cannot_be_read_is_named_by_who_reads_it(error: Exception) -> None:
    words = r"^a/b: the table cannot be read \(.*\); make or copy it"
    with pytest.raises(DataError, match=words), reading("a/b", "the table"):
        raise error
    own = ConfigError("told already")
    with pytest.raises(ConfigError, match="told already"), reading("a", "it"):
        raise own
    door = reading("tok", "the tokenizer", CheckpointError)
    with pytest.raises(CheckpointError, match="tok: the tokenizer cannot be read"), door:
        Tokenizer.from_str("{}")


def test_a_fault_keeps_its_traceback_in_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    found = as_lbr_error(raised(lambda: {}["gone"]))
    assert isinstance(found, InternalError)
    assert found.exit_code == 1
    (file,) = tmp_path.iterdir()
    assert "probably a bug in lbr-ds" in str(found)
    assert "KeyError: 'gone'" in str(found)
    assert str(file) in str(found)
    assert "Traceback (most recent call last)" in file.read_text()


def test_a_fault_of_a_rank_goes_into_its_log(tmp_path: Path) -> None:
    """And becomes an error with a code, before the other ranks are notified."""
    handler = logging.FileHandler(tmp_path / "rank-0.log")
    logging.getLogger("lbr_ds").addHandler(handler)
    try:
        with pytest.raises(InternalError, match=r"ZeroDivisionError.*rank-0\.log"), Watch(ALONE, 1):
            1 / 0  # noqa: B018
        with pytest.raises(EnvironmentProblem, match="x: no space is left"), Watch(ALONE, 1):
            raise OSError(errno.ENOSPC, "", "x")
    finally:
        logging.getLogger("lbr_ds").removeHandler(handler)
        handler.close()
    assert "1 / 0" in (tmp_path / "rank-0.log").read_text()


def test_the_command_line_says_it_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: Any) -> None:
        raise KeyError("of ours")

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("lbr_ds.system.resources.copy_shipped", broken)
    code, lines = command("init", str(tmp_path / "a"))
    assert (code, len(lines)) == (1, 1)
    assert lines[0].startswith("lbr-ds: error: unexpected error, probably a bug in lbr-ds")
    monkeypatch.setenv("LBR_TRACEBACK", "1")
    code, lines = command("init", str(tmp_path / "b"))
    assert code == 1
    assert "Traceback (most recent call last):" in lines


def test_a_reader_that_leaves_is_no_error() -> None:
    """As in `lbr-ds ... | head`: quiet, with the code that shells give to it."""
    read, write = os.pipe()
    os.close(read)
    import subprocess
    import sys

    done = subprocess.run(
        [sys.executable, "-m", "lbr_ds", "plan", "demo", "--nodes", "1", "--gpus", "1"],
        stdout=write,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"RANK": "0", "WORLD_SIZE": "1"}, "LOCAL_RANK is not set"),
        ({"RANK": "0", "LOCAL_RANK": "x", "WORLD_SIZE": "1"}, "LOCAL_RANK is 'x'"),
        ({"RANK": "3", "LOCAL_RANK": "3", "WORLD_SIZE": "2"}, "RANK=3 is no rank of WORLD_SIZE=2"),
    ],
)
def test_half_a_launcher_is_named(
    environment: dict[str, str], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lbr_ds import distributed

    monkeypatch.setattr(distributed, "_joined", None)
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29999", **environment}
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(EnvironmentProblem, match=words):
        distributed.join(1)


def test_values_in_errors_are_bounded() -> None:
    assert short("x" * 10**6) == "x" * 197 + "..."
    assert short("a\nb  c") == "a b c"
    assert len(short({"a": ["x" * 10**6] * 100})) <= 200
    assert len(short(10**5000)) <= 200
    nested: list[Any] = []
    for _ in range(10_000):
        nested = [nested]
    assert len(short(nested)) <= 200


def test_a_long_name_of_a_recipe_is_one_line() -> None:
    for name in ("x" * 300, "x" * 70_000):
        code, lines = command("plan", name, "--nodes", "1", "--gpus", "1")
        assert (code, len(lines)) == (6, 1)
        assert len(lines[0]) < 400
    with pytest.raises(ConfigError, match="no file 'nothing'"):
        find_shipped("recipes", "nothing", ".yaml")
    assert pathlib.Path(find_shipped("recipes", "demo", ".yaml")).is_file()


def test_python_m_does_the_same(tmp_path: Path) -> None:
    done = run_cli("plan", "demo", "--nodes", "1", "--gpus", "1", "--json", str(tmp_path))
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
