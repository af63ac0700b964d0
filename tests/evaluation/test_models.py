"""What MODEL may be: folders, runs, checkpoints, names; and the line when it is none of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lbr_ds.config import load
from lbr_ds.errors import ConfigError, EnvironmentProblem
from lbr_ds.evaluation import OwnModel, load_model
from lbr_ds.evaluation.baselines import resolve
from lbr_ds.evaluation.models import _runs_own_code
from lbr_ds.model.bottleneck import prepare_backbone
from lbr_ds.model.packed_encoder import PackedEncoder
from lbr_ds.runs import checkpoint_name, resolve_model
from tests.tiny import seal, tiny_recipe


def checkpoint(run: Path, stage: int, step: int, whole: bool = True) -> Path:
    """A checkpoint's `model/` folder; without its state it was never finished."""
    folder = run / f"stage{stage}" / "checkpoints" / f"step-{step:06d}" / "model"
    folder.mkdir(parents=True)
    (folder / "lbr.json").write_text("{}")
    if whole:
        seal(folder.parent, {})
    return folder


def test_the_newest_whole_checkpoint_of_the_last_stage(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def found(place: Path) -> Path | None:
        model = resolve_model(str(place))
        assert (model.ours, model.packed) == (True, True)
        return model.folder

    (tmp_path / "backbone").mkdir()
    (tmp_path / "backbone" / "lbr.json").write_text("{}")
    assert found(tmp_path) == tmp_path / "backbone"
    first = checkpoint(tmp_path, 1, 900)
    assert found(tmp_path) == first
    assert checkpoint_name(first) == "step-000900"
    assert checkpoint_name(tmp_path / "backbone") is None
    checkpoint(tmp_path, 2, 5)
    last = checkpoint(tmp_path, 2, 12)
    unfinished = checkpoint(tmp_path, 2, 99, whole=False)
    assert found(tmp_path) == last
    assert f"{unfinished.parent} is damaged and skipped: files.json: missing" in caplog.text
    assert found(tmp_path / "stage1") == found(first.parent) == found(first) == first


def test_folders_of_others(tmp_path: Path) -> None:
    assert resolve_model("owner/name").folder is None
    for name in ("config.json", "modules.json"):
        (tmp_path / name).write_text("{}")
        model = resolve_model(str(tmp_path))
        assert (model.folder, model.ours, model.packed) == (tmp_path, False, False)
    (tmp_path / "lbr.json").write_text("{}")  # an export of ours
    model = resolve_model(str(tmp_path))
    assert (model.folder, model.ours, model.packed) == (tmp_path, True, False)


def test_a_run_is_loaded_as_a_model_of_ours(tmp_path: Path) -> None:
    run = load(tiny_recipe(tmp_path, prepared=False))
    prepare_backbone(run.model, run.bottleneck, run.run / "backbone", 0)
    model: Any = load_model(str(run.run), batch_tokens=40)
    assert isinstance(model, OwnModel)
    assert model.encoder.folder == run.run / "backbone"
    vectors = model.encode([], instructed=["a", "b", "c"])
    assert np.array_equal(vectors, PackedEncoder(run.run / "backbone").encode(["a", "b", "c"], 40))
    assert np.allclose(model.similarity(vectors, vectors).diagonal(), 1)


@pytest.mark.parametrize("name", ["/no/such", "./run", "a/b/c"])
def test_a_path_that_is_not_there(name: str) -> None:
    with pytest.raises(ConfigError, match="no such folder"):
        load_model(name)


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no model"):
        load_model(str(tmp_path))


def test_an_unknown_name_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        assert kwargs == {"trust_remote_code": False, "model_kwargs": {"use_safetensors": True}}
        raise OSError("no route to host\nand a long tail")

    monkeypatch.setattr("sentence_transformers.SentenceTransformer", fail)
    with pytest.raises(EnvironmentProblem, match="'nobody/nothing': no route to host") as caught:
        load_model("nobody/nothing")
    assert "\n" not in str(caught.value)


def test_foreign_code_needs_a_yes() -> None:
    import mteb

    with pytest.raises(ConfigError, match="trust_remote_code"):
        load_model("nomic-ai/nomic-embed-text-v1")
    assert not _runs_own_code(mteb.get_model_meta("sentence-transformers/all-MiniLM-L6-v2"))


def test_baselines_of_the_paper_are_names_that_are_known() -> None:
    """Those of mteb's registry by looking there; HuaTuo has no model to load and says so."""
    import mteb

    for name in ("bm25", "bge", "gte", "llm2vec"):
        assert mteb.get_model_meta(resolve(name)).name == resolve(name)
    assert resolve("some/name") == "some/name"
    with pytest.raises(ConfigError, match="huatuo: published as LoRA weights alone"):
        load_model("huatuo")


def test_importing_does_not_write_into_the_home() -> None:
    import os

    assert os.environ["MTEB_CACHE"].endswith("mteb")
    assert Path(os.environ["MTEB_CACHE"]) != Path.home() / ".cache" / "mteb"
