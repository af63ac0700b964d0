"""What is recorded about the installation, and how the same code is installed again."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

import lbr_ds
from lbr_ds.errors import EnvironmentProblem
from lbr_ds.system import environment, locate

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def recorded(monkeypatch: pytest.MonkeyPatch, origin: dict[str, Any] | None) -> dict[str, Any]:
    """The facts of an installation for which the installer recorded `origin`."""

    class Distribution:
        def read_text(self, name: str) -> str | None:
            return None if origin is None else json.dumps(origin)

    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: Distribution())
    return environment.installation()


def test_a_commit_is_installed_again_by_its_hash(monkeypatch: pytest.MonkeyPatch) -> None:
    url = "https://user:pw@git.example.org/lbr-ds.git"
    origin = {"url": url, "vcs_info": {"vcs": "git", "commit_id": COMMIT}}
    facts = recorded(monkeypatch, origin)
    assert facts["commit"] == COMMIT
    assert facts["install"] == (
        f"pip install 'lbr-ds @ git+https://git.example.org/lbr-ds.git@{COMMIT}'"
    )


def test_an_archive_is_installed_again_by_its_hash(monkeypatch: pytest.MonkeyPatch) -> None:
    origin = {
        "url": "https://example.org/lbr_ds-1-py3-none-any.whl",
        "archive_info": {"hashes": {"sha256": "ab"}},
    }
    facts = recorded(monkeypatch, origin)
    assert facts["install"] == f"pip install '{origin['url']}#sha256=ab'"
    local = recorded(monkeypatch, {**origin, "url": "file:///home/me/lbr_ds-1-py3-none-any.whl"})
    assert "/home/me" not in json.dumps(local)


@pytest.mark.parametrize("changed", [False, True])
def test_a_clone_is_named_by_its_commit(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, changed: bool
) -> None:
    package = tmp_path / "lbr_ds" / "__init__.py"
    package.parent.mkdir()
    package.write_text("one")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=x", "-c", "user.email=x@example.org"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "first"]):
        subprocess.run([*git, *words], check=True)
    if changed:
        package.write_text("two")
    monkeypatch.setattr(lbr_ds, "__file__", str(package))
    facts = recorded(monkeypatch, {"url": tmp_path.as_uri(), "dir_info": {"editable": True}})
    head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True)
    assert facts["commit"] == head.stdout.strip()
    assert facts["changed"] is changed
    assert ("local changes" in facts["install"]) is changed


def test_without_a_record_no_name_is_given_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(lbr_ds, "__file__", str(tmp_path / "lbr_ds" / "__init__.py"))
    assert recorded(monkeypatch, None) == {"version": lbr_ds.__version__}


def test_pip_is_found_in_an_environment_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "pip" else find(name)
    )
    command = locate._pip("x==1")
    done = subprocess.run([*command, "--version"], capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stdout.startswith("pip ")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(EnvironmentProblem, match="no pip; install it"):
        locate._pip("x==1")
