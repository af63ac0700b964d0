"""The session is built with a warning where bf16 is slow; steps: test_stages.py."""

from __future__ import annotations

import importlib
import logging
from pathlib import Path

import pytest

from lbr_ds.config import load
from lbr_ds.distributed import World
from lbr_ds.system import environment
from lbr_ds.training import session
from lbr_ds.training.deepspeed.engine import load_layout
from lbr_ds.training.deepspeed.library import compiler
from tests.tiny import tiny_recipe


@pytest.mark.parametrize("layout", ["zero2", "zero3_cpu"])
@pytest.mark.parametrize("lacking", [True, False])
def test_a_cpu_that_is_slow_in_bf16_is_named(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    layout: str,
    lacking: bool,
) -> None:
    run = load(tiny_recipe(tmp_path, prepared=False))
    monkeypatch.setattr(environment, "cpu_lacks_bf16", lambda: lacking)
    with caplog.at_level(logging.WARNING, "lbr_ds"):
        session.warn_of_slow_bf16(run, load_layout(layout), World())
    said = "no instructions for bf16" in caplog.text
    assert said is (lacking and layout == "zero2")


def test_an_engine_without_muon_needs_no_compiler() -> None:
    """DeepSpeed's functions of Muon are plain ones; what is compiled later still is."""
    module = importlib.import_module("deepspeed.runtime.zero.muon.original_muon")
    assert not hasattr(module.muon_update, "_torchdynamo_orig_callable")
    assert hasattr(compiler.compile()(plain), "_torchdynamo_orig_callable")


def plain() -> None: ...
