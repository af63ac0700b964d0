"""What a stage cannot be trained with is refused at its start, in one line."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoTokenizer

from lbr_ds.config import RunConfig, load
from lbr_ds.distributed import ALONE
from lbr_ds.errors import CheckpointError, ConfigError
from lbr_ds.model.bottleneck import prepare_backbone
from lbr_ds.training.setup import check_backbone
from lbr_ds.training.starts import starting_point
from tests.tiny import backbone, tiny_recipe


def run_with(tmp_path: Path, raw: Path, *overrides: str) -> RunConfig:
    recipe = tiny_recipe(tmp_path / "tiny", prepared=False)
    run = load(recipe, [f"model.backbone={raw}", *overrides])
    prepare_backbone(run.model, run.bottleneck, run.run / "backbone", run.seed)
    return run


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_stage_1_needs_positions_for_the_answer_too(tmp_path: Path, family: str) -> None:
    raw = backbone(tmp_path / "raw", family, max_position_embeddings=48)
    run = run_with(tmp_path, raw)
    check_backbone(run, 2, ALONE)
    with pytest.raises(
        ConfigError,
        match=r"model.max_length=32 \+ stage1.max_target_length=32 = "
        r"64 tokens, but model.backbone=.* has 48 positions",
    ):
        check_backbone(run, 1, ALONE)
    check_backbone(run_with(tmp_path, raw, "stage1.max_target_length=16"), 1, ALONE)


def test_stage_1_needs_a_head(tmp_path: Path) -> None:
    whole, raw = backbone(tmp_path / "whole", tie_word_embeddings=False), tmp_path / "raw"
    AutoModel.from_pretrained(whole).save_pretrained(raw)
    AutoTokenizer.from_pretrained(whole).save_pretrained(raw)
    run = run_with(tmp_path, raw)
    check_backbone(run, 2, ALONE)
    with pytest.raises(
        ConfigError,
        match=r"has no language-model head \(lm_head.weight\) .*"
        r"stage2.from=backbone",
    ):
        check_backbone(run, 1, ALONE)


def test_stage_2_starts_from_no_damaged_folder(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    raw = backbone(tmp_path / "raw")
    run = run_with(tmp_path, raw)
    other = tmp_path / "other"
    shutil.copytree(run.run / "backbone", other)
    chosen = run.model_copy(
        update={"stage2": run.stage2.model_copy(update={"start_from": str(other)})}
    )
    with caplog.at_level(logging.INFO, "lbr_ds"):
        assert starting_point(chosen, 2, ALONE) == other
    tensors = load_file(other / "model.safetensors")
    tensors["model.norm.weight"][3] += 1
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"other: a file .*\(model.safetensors: .*sha256"):
        starting_point(chosen, 2, ALONE)
