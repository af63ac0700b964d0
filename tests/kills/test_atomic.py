"""Files and folders of `atomic`, killed at every single operation on files."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from lbr_ds.errors import ConfigError
from lbr_ds.system import atomic
from lbr_ds.system.atomic import atomic_file, atomic_folder, recover, write_json, write_text
from tests.kills.crash import every_point, run, tree

pytestmark = pytest.mark.slow

OLD = {"manifest": b"old", "train": None, "train/0": b"old shard"}
NEW = {"manifest": b"new", "train": None, "train/0": b"new shard", "train/1": b"more"}
FOREIGN = {
    "target.part": None,
    "target.part/mine": b"precious",
    ".target.lbr-note": b"not ours",
    ".target.lbr-0123.part": None,
    ".target.lbr-0123.part/mine": b"precious",
}


def fill(folder: Path, content: dict[str, bytes | None]) -> None:
    for name, data in content.items():
        if data is None:
            (folder / name).mkdir(parents=True)
        else:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data)


def build(target: Path) -> None:
    with atomic_folder(target, check=lambda place: None) as folder:
        fill(folder, NEW)


@pytest.mark.parametrize(
    ("exchange", "before"),
    [(True, None), (True, OLD), (False, OLD), (False, {})],
    ids=["missing", "finished", "finished-journal", "empty-journal"],
)
def test_a_folder_is_old_or_new_wherever_its_writer_is_killed(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    before: dict[str, bytes | None] | None,
    exchange: bool,
) -> None:
    if not exchange:  # as NFS and overlay file systems answer
        monkeypatch.setattr(atomic, "_swap", lambda one, other: False)
    place = tmp_path / "place"
    target = place / "target"

    def reset() -> None:
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        fill(place, FOREIGN)
        if before is not None:
            target.mkdir()
            fill(target, before)

    kills, seen = 0, []
    for _ in every_point(lambda: build(target), reset, writes=True):
        kills += 1
        if not exchange and not target.exists():
            recover(target)
            assert tree(target) == NEW
        seen.append(tree(target) if target.exists() else None)
        assert seen[-1] in (before, NEW)
        run(lambda: build(target))
        finished = {"target": None, **{f"target/{name}": data for name, data in NEW.items()}}
        assert tree(place) == {**FOREIGN, **finished}
    assert before in seen
    assert NEW in seen
    assert kills > 30


def test_a_file_is_old_or_new_wherever_its_writer_is_killed(tmp_path: Path) -> None:
    place = tmp_path / "place"
    target = place / "report.json"

    def reset() -> None:
        shutil.rmtree(place, ignore_errors=True)
        fill(place, {"report.json": b"old", ".report.json.part": b"mine"})

    seen = []
    for _ in every_point(lambda: write_json(target, ["new"]), reset, writes=True):
        seen.append(target.read_bytes())
        run(lambda: write_json(target, ["new"]))
        assert tree(place) == {".report.json.part": b"mine", "report.json": b'[\n "new"\n]\n'}
    assert set(seen) == {b"old", b'[\n "new"\n]\n'}


def test_work_under_a_key_continues_after_a_kill_and_is_removed_after_an_error(
    tmp_path: Path,
) -> None:
    target = tmp_path / "target"

    def build_in_parts(key: str, last: int = 3) -> list[str]:
        with atomic_folder(target, key=key) as folder:
            before = sorted(path.name for path in folder.iterdir())
            for number in range(last):
                (folder / str(number)).write_bytes(b"")
                if number == 1 and last == 2:
                    raise KeyboardInterrupt
            if last == 1:
                raise OSError("full")
        return before

    for last, error in ((2, KeyboardInterrupt), (1, OSError), (2, KeyboardInterrupt)):
        with pytest.raises(error):
            build_in_parts("a1", last)
    assert len(list(tmp_path.iterdir())) == 1
    assert build_in_parts("a1") == ["0", "1"]
    assert sorted(tree(tmp_path)) == ["target", "target/0", "target/1", "target/2"]


def test_another_key_removes_what_was_left(tmp_path: Path) -> None:
    target = tmp_path / "target"

    def interrupted(key: str) -> None:
        with atomic_folder(target, key=key) as folder:
            assert not list(folder.iterdir())
            (folder / key).write_bytes(b"")
            raise KeyboardInterrupt

    for key in ("a1", "b2"):
        with pytest.raises(KeyboardInterrupt):
            interrupted(key)
    assert [path.name for path in tmp_path.iterdir()] == [".target.lbr-b2.part"]


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    path.chmod(0o640)

    def interrupted() -> None:
        with atomic_file(path) as file:
            file.write(b"new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert tree(tmp_path) == {"file": b"old"}
    write_text(path, "new")
    assert tree(tmp_path) == {"file": b"new"}
    assert path.stat().st_mode & 0o777 == 0o640


def test_links_are_followed_and_devices_are_written(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("real")
    write_text(tmp_path / "link", "text")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text() == "text"
    write_text(Path("/dev/null"), "text")
    assert Path("/dev/null").is_char_device()


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(IsADirectoryError) as directory:
        write_text(tmp_path / "folder", "text")
    with pytest.raises(OSError, match="file") as below:
        write_text(tmp_path / "file" / "below", "text")
    assert directory.value.filename == str(tmp_path / "folder")
    assert str(below.value.filename).startswith(str(tmp_path / "file"))


def test_places_that_cannot_be_replaced_are_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "inside").mkdir()
    monkeypatch.chdir(tmp_path / "inside")
    for place, why in (
        (Path(), "is or contains the working directory"),
        (tmp_path, "working directory"),
        (Path("/proc"), "/proc is a mount point"),
        (tmp_path / "file", "file is a file"),
    ):
        with pytest.raises(ConfigError, match=why), atomic_folder(place):
            pytest.fail("entered")


def test_a_link_to_a_folder_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("real")
    with atomic_folder(tmp_path / "link") as folder:
        (folder / "file").write_bytes(b"new")
    assert (tmp_path / "link").is_symlink()
    assert tree(tmp_path / "real") == {"file": b"new"}


def test_names_of_the_greatest_length(tmp_path: Path) -> None:
    name = "\u4e2d" * 85
    write_text(tmp_path / name, "text")
    with atomic_folder(tmp_path / "folder" / name) as folder:
        (folder / "file").write_bytes(b"new")
    assert sorted(tree(tmp_path)) == ["folder", f"folder/{name}", f"folder/{name}/file", name]
