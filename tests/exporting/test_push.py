"""Uploads to a hub on this machine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from lbr_ds.errors import ConfigError, EnvironmentProblem
from lbr_ds.exporting.push import push
from tests.exporting import hub as hubs


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[hubs.Hub]:
    with hubs.serving() as hub:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", hub.token)
        yield hub


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The files that make a folder an export; what is in them does not matter to an upload."""
    model = tmp_path / "model"
    (model / "1_Pooling").mkdir(parents=True)
    for name in ("lbr.json", "modules.json", "parity.json", "1_Pooling/config.json"):
        (model / name).write_text("{}\n")
    (model / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A model\n")
    (model / "model.safetensors").write_bytes(bytes(range(256)) * 64)
    (model / ".README.md.swp").touch()
    return model


def test_a_folder_arrives_whole_and_private(hub: hubs.Hub, folder: Path) -> None:
    assert push(folder, "owner/name") == f"{hub.url}/owner/name/commit/{'0' * 40}"
    repository = hub.repositories["owner/name"]
    assert repository["private"] is True
    files = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    del files[".README.md.swp"]
    assert repository["files"] == files


def test_a_second_upload_changes_the_same_repository(hub: hubs.Hub, folder: Path) -> None:
    push(folder, "owner/name", private=False)
    assert hub.repositories["owner/name"]["private"] is False
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# The same model\n")
    push(folder, "owner/name")
    assert b"the same" in hub.repositories["owner/name"]["files"]["README.md"].lower()
    assert hub.repositories["owner/name"]["private"] is False


def test_what_is_refused_is_one_line(
    hub: hubs.Hub, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="'a/b/c' is not a repository's name"):
        push(folder, "a/b/c")
    with pytest.raises(ConfigError, match="is not an exported folder; make one with"):
        push(tmp_path, "owner/name")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(EnvironmentProblem, match=r"cannot upload to owner/name: .*hf auth login"):
        push(folder, "owner/name")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(EnvironmentProblem, match=r"\(check the network and repeat the command\)$"):
        push(folder, "owner/name")
    assert hub.repositories == {}
