"""Shards behind a URL: the same stream, fetched once, checked, within the cache's limit."""

from __future__ import annotations

import json
import logging
import multiprocessing
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import pytest

from lbr_ds.errors import ConfigError, DataError, EnvironmentProblem
from lbr_ds.shards import Manifest, Step, read_split, steps, verify
from lbr_ds.shards import manifest as manifest_module
from lbr_ds.system import download
from tests.shards.server import Server, serve

GIB = 2**30


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LBR_DS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(download, "RETRY_WAITS", (0.0, 0.0))
    manifest_module._fetched.cache_clear()
    return tmp_path / "cache" / "shards"


@pytest.fixture
def server(prepared: Path) -> Iterator[Server]:
    with serve(prepared) as running:
        yield running


def stream(
    folder: Path | str, stop: int = 40, cache_gib: float = 1, per_step: int = 6, **more: int
) -> list[Step]:
    place = {"rank": 0, "world": 1, "samples_per_step": per_step, **more}
    return list(steps(folder, "gl", seed=3, stop=stop, cache_gib=cache_gib, **place))


def in_memory(folder: Path) -> str:
    target = fsspec.filesystem("memory")
    target.put(f"{folder}/", "/bucket/data", recursive=True)
    return "memory://bucket/data"


def in_file(folder: Path) -> str:
    return f"file://{folder}"


@pytest.mark.parametrize("place", [in_memory, in_file])
def test_object_stores_give_the_local_stream(
    shared_prepared: Path, cache: Path, place: Callable[[Path], str]
) -> None:
    url = place(shared_prepared)
    assert stream(url) == stream(shared_prepared)
    assert list(read_split(url + "/", "gl")) == list(read_split(shared_prepared, "gl"))
    assert verify(url).records("gl") == 103
    names = {shard.sha256 for shard in Manifest.load(shared_prepared).shards("gl")}
    assert {path.stem for path in cache.glob("*.tar")} == names
    assert not list(cache.glob("*.part"))


def test_http_gives_the_local_stream_and_fetches_each_shard_once(server: Server) -> None:
    two_epochs = stream(server.url)
    assert two_epochs == stream(server.folder)
    assert {sample.epoch for step in two_epochs for sample in step.samples} >= {0, 1}
    assert sorted(server.tars) == [f"/data/gl/0000{i}.tar" for i in range(3)]
    assert stream(server.url) == two_epochs  # a second reader
    assert stream(server.url, rank=1, world=2)
    assert len(server.tars) == 3
    assert server.asked.count("/data/manifest.json") == 1


@pytest.mark.parametrize("fault", ["busy", "hang up", "cut", "flip"])
def test_one_bad_answer_is_asked_for_again(
    server: Server, fault: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "lbr_ds")
    server.faults = [fault]
    assert stream(server.url) == stream(server.folder)
    assert len(server.tars) == 4
    assert "/gl/0000" in caplog.text
    assert "trying again" in caplog.text


@pytest.mark.parametrize(
    ("fault", "kind", "words"),
    [
        ("busy", EnvironmentProblem, r"gl/0000\d.tar: cannot be read \(HTTP 503\)"),
        (
            "cut",
            DataError,
            r"gl/0000\d.tar: truncated: \d+ bytes, but the manifest lists \d+;",
        ),
        ("flip", DataError, r"gl/0000\d.tar: altered: its sha256 is .*, but the manifest lists"),
    ],
)
def test_what_stays_bad_is_named(
    server: Server, cache: Path, fault: str, kind: type[Exception], words: str
) -> None:
    server.faults = [fault] * 9  # three answers about each of three shards
    with pytest.raises(kind, match=words):
        stream(server.url)
    assert max(Counter(server.tars).values()) == 3
    server.faults = []
    assert not list(cache.glob("*.tar"))
    assert not list(cache.glob("*.part"))
    assert stream(server.url) == stream(server.folder)


def test_the_shards_of_a_step_are_fetched_together(server: Server, cache: Path) -> None:
    """And no others: here one of three, two with room for them, or one after the other."""
    local = Manifest.load(server.folder)
    only = next(iter(stream(server.url, stop=1, per_step=1)))
    assert server.tars == [f"/data/{local.shards('gl')[only.samples[0].shard].file}"]
    shutil.rmtree(cache)
    server.tars_at_once = 0
    server.together = 3
    assert stream(server.url, stop=1) == stream(server.folder, stop=1)
    assert server.tars_at_once == 3
    shutil.rmtree(cache)
    server.tars_at_once, server.together, server.patience = 0, 2, 0.2
    limit = sum(shard.bytes for shard in local.shards("gl"))
    small = stream(server.url, stop=1, cache_gib=limit / GIB)
    assert small == stream(server.folder, stop=1)
    assert server.tars_at_once == 1


def test_missing_shard_manifest_and_server(server: Server, prepared: Path) -> None:
    (prepared / "gl" / "00001.tar").unlink()
    with pytest.raises(DataError, match=r"/gl/00001.tar: the manifest names .* it is missing"):
        stream(server.url)
    with pytest.raises(DataError, match=r"/other holds no manifest.json; run `lbr-ds prepare`"):
        Manifest.load(server.url + "/other")
    with pytest.raises(EnvironmentProblem, match=r"cannot be read .*check the network"):
        Manifest.load("http://127.0.0.1:1/data")
    with pytest.raises(ConfigError, match="nonsense://x: no such kind of address"):
        Manifest.load("nonsense://x")


def test_secrets_are_used_and_never_shown(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    server.password = "me:hid/den"
    url = server.url.replace("//", "//me:hid%2Fden@") + "?sign=secret"
    server.faults = ["busy"]
    assert stream(url) == stream(server.folder)
    server.password = "other"
    with pytest.raises(EnvironmentProblem, match=r"HTTP 401.*credentials") as raised:
        Manifest.load(url + "2")
    shown = f"{raised.value} {caplog.text} {Manifest.load(url).place}"
    assert not any(word in shown for word in ("hid", "me:", "secret", "sign"))


def held(cache: Path) -> int:
    return sum(path.stat().st_size for path in cache.iterdir())


def test_cache_limit(server: Server, cache: Path) -> None:
    sizes = sorted(shard.bytes for shard in Manifest.load(server.folder).shards("gl"))
    limit = sizes[-1] + sizes[-2]
    for record in read_split(server.url, "gl", cache_gib=limit / GIB):
        assert record
        assert held(cache) <= limit
    assert len(list(cache.glob("*.tar"))) == 2
    assert stream(server.url, cache_gib=limit / GIB) == stream(server.folder)
    assert held(cache) <= limit
    with pytest.raises(ConfigError, match=r"data.cache_gib=.* is less than one shard"):
        stream(server.url, cache_gib=sizes[0] / 2 / GIB)


def test_least_recently_used_shard_goes_first(server: Server, cache: Path) -> None:
    local = Manifest.load(server.folder)
    shards = sorted(local.shards("gl"), key=lambda shard: shard.bytes)
    limit = (shards[-1].bytes + shards[-2].bytes) / GIB
    manifest = Manifest.load(server.url, limit)
    for shard in (shards[1], shards[2], shards[1], shards[0]):
        assert manifest.file(shard).is_file()
    assert {path.stem for path in cache.glob("*.tar")} == {shards[0].sha256, shards[1].sha256}


def _read_in_child(url: str, limit: float, rank: int, results: multiprocessing.Queue) -> None:  # type: ignore[type-arg]
    download.RETRY_WAITS = (0.0,)
    found = stream(url, cache_gib=limit, rank=rank, world=3)
    results.put((rank, [sample.record.id for step in found for sample in step.samples]))


@pytest.mark.parametrize("room", [1, 3])
def test_many_processes_share_the_cache(server: Server, cache: Path, room: int) -> None:
    """With room for all, a shard is fetched once; with room for one, they still get through."""
    sizes = sorted(shard.bytes for shard in Manifest.load(server.folder).shards("gl"))
    limit = sum(sizes[-room:])
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    cache.mkdir(parents=True)
    (cache / f"{'0' * 64}.part").write_bytes(bytes(limit))  # of one that was killed
    children = [
        context.Process(target=_read_in_child, args=(server.url, limit / GIB, rank, results))
        for rank in range(3)
    ]
    for child in children:
        child.start()
    found = dict(results.get(timeout=300) for _ in children)
    for child in children:
        child.join()
    for rank in range(3):
        wanted = stream(server.folder, rank=rank, world=3)
        assert found[rank] == [s.record.id for step in wanted for s in step.samples]
    assert held(cache) <= limit
    if room == 3:
        assert len(server.tars) == 3


def test_manifest_cannot_lead_out_of_the_cache(server: Server, prepared: Path) -> None:
    path = prepared / "manifest.json"
    raw = json.loads(path.read_text())
    raw["splits"]["gl"]["shards"][0]["sha256"] = "../../x"
    path.write_text(json.dumps(raw))
    with pytest.raises(DataError, match=r"manifest.json: not a shard"):
        Manifest.load(server.url)


def test_files_beside_the_manifest(server: Server, prepared: Path) -> None:
    (prepared / "trained.u64").write_bytes(b"some")
    for place in (prepared, server.url, server.url):
        assert Manifest.load(place).beside("trained.u64") == b"some"
        assert Manifest.load(place).beside("other") is None
    assert server.asked.count("/data/trained.u64") == 1


def test_disk_that_cannot_be_written(server: Server, cache: Path) -> None:
    cache.parent.mkdir()
    cache.write_text("a file where the folder should be")
    with pytest.raises(EnvironmentProblem, match=r"cannot be written or locked .*LBR_DS_CACHE"):
        stream(server.url)


def test_prepared_again_elsewhere_is_fetched_anew(server: Server, tmp_path: Path) -> None:
    from tests.shards.toy import make_folder

    before = stream(server.url)
    shutil.rmtree(server.folder)
    make_folder(server.folder, 90, 40)
    manifest_module._fetched.cache_clear()  # another process
    assert stream(server.url) == stream(server.folder) != before


def test_a_file_that_the_manifest_vouches_for_is_checked(
    server: Server, prepared: Path, cache: Path
) -> None:
    """On this disk and behind a URL, from where it is fetched as a shard is."""
    path = prepared / "trained.u64"
    path.write_bytes(b"as it was written")
    Manifest.load(prepared).with_file(path.name).save()
    for place in (prepared, server.url, server.url):
        assert Manifest.load(place).beside(path.name) == b"as it was written"
    assert server.asked.count("/data/trained.u64") == 1
    shutil.rmtree(cache)
    path.write_bytes(b"as it was changed")
    with pytest.raises(DataError, match=r"trained\.u64: altered; copy the file again"):
        Manifest.load(prepared).beside(path.name)
    with pytest.raises(
        DataError, match=r"/data/trained\.u64: altered: its sha256 .*; copy the file"
    ):
        Manifest.load(server.url).beside(path.name)
    path.unlink()
    with pytest.raises(DataError, match=r"trained\.u64: missing; copy the file again"):
        Manifest.load(prepared).beside(path.name)
    with pytest.raises(DataError, match="manifest names this file and it is missing; copy it"):
        Manifest.load(server.url).beside(path.name)
