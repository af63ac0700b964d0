"""Sources behind URLs give the rows of the same files on disk; faults of servers lose nothing."""

from __future__ import annotations

import gzip
import io
import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lbr_ds.config import DataConfig, SourceConfig
from lbr_ds.corpora import engine, sources
from lbr_ds.corpora.formats import columnar, interface
from lbr_ds.corpora.formats.interface import Piece
from lbr_ds.corpora.nodes import Spread
from lbr_ds.corpora.prepare import prepare
from lbr_ds.corpora.sources import Corpus, find
from lbr_ds.errors import ConfigError, DataError, EnvironmentProblem
from lbr_ds.system import process_pool, remote_files
from tests.corpora.range_server import Server, serving

SIZE = 1000  # bytes of a piece and of a request


@pytest.fixture(autouse=True)
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LBR_DS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("lbr_ds.system.download.RETRY_WAITS", (0.0, 0.0))
    monkeypatch.setattr(interface, "PIECE_BYTES", SIZE)
    monkeypatch.setattr(remote_files, "RANGE_BYTES", SIZE)
    monkeypatch.setattr(sources, "WHOLE_BYTES", 0)


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as state:
        yield state


def rows(first: int, count: int) -> list[dict[str, Any]]:
    numbers = range(first, first + count)
    return [
        {"question": f"what is {n}?", "reply": f"number {n} " + "ab " * (n % 30)} for n in numbers
    ]


def json_lines(made: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in made).encode()


def parquet(made: list[dict[str, Any]], group: int = 7) -> bytes:
    import pyarrow.parquet

    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(made), file, row_group_size=group)
    return file.getvalue()


MAKE = {
    "jsonl": json_lines,
    "jsonl.gz": lambda made: gzip.compress(json_lines(made)),
    "parquet": parquet,
}


def corpus_files(kind: str, count: int = 5) -> dict[str, bytes]:
    """The files of a folder: the first is large, the others are smaller than a piece or not."""
    sizes = [120, *(20 + 5 * part for part in range(count - 1))]
    return {
        f"part-{part}.{kind}": MAKE[kind](rows(sum(sizes[:part]), size))
        for part, size in enumerate(sizes)
    }


def stored(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir()
    for name, raw in files.items():
        (folder / name).write_bytes(raw)
    return folder


def found(path: str | Path, **fields: Any) -> Corpus:
    pairs = {"query": "question", "positives": "reply"}
    given = {"path": str(path), "name": "toy", "columns": pairs, "license": "CC0", **fields}
    return find(SourceConfig.model_validate(given))


def plain(outcomes: Any) -> list[str]:
    """Records as JSON, errors as texts without the place of the file."""
    return [
        str(one).split("/")[-1] if isinstance(one, DataError) else one.to_json()
        for _, one in outcomes
    ]


def in_pieces(corpus: Corpus) -> list[str]:
    """The outcomes of all pieces, read backwards, each by a copy that was sent."""
    sent = [pickle.loads(pickle.dumps((corpus, piece))) for piece in corpus.pieces()]
    assert all(len(pickle.dumps(copy)) < 2000 and not piece.data for copy, piece in sent)
    read = [plain(copy.read(piece)) for copy, piece in reversed(sent)]
    return [one for outcomes in reversed(read) for one in outcomes]


@pytest.mark.parametrize("kind", MAKE)
def test_a_folder(tmp_path: Path, server: Server, kind: str) -> None:
    server.files = corpus_files(kind)
    folder = stored(tmp_path / "parts", server.files)
    wanted = plain(found(folder).read())
    assert len(wanted) == 120 + 20 + 25 + 30 + 35
    places = [f"{server.url}/part-{{0..4}}.{kind}", f"file://{folder}", f"file://{folder}/part-*"]
    for place in places:
        corpus = found(place)
        assert plain(corpus.read()) == wanted == in_pieces(corpus)
        corpus.check_unchanged()
        made = corpus.provenance()
        assert (made["bytes"], made["streamed"]) == (corpus.size, 5)
        assert corpus.size == sum(map(len, server.files.values())) == found(folder).size
        share = sum(piece.length for piece in corpus.pieces()) / corpus.size
        assert share == 1 or (0.4 < share < 1 and kind == "parquet")  # without footers


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_file(tmp_path: Path, server: Server, kind: str) -> None:
    server.files = {f"raw.{kind}": MAKE[kind](rows(0, 400))}
    folder = stored(tmp_path / "parts", server.files)
    wanted = plain(found(folder / f"raw.{kind}").read())
    for place in (f"{server.url}/raw.{kind}", f"file://{folder}/raw.{kind}"):
        assert plain(found(place).read()) == wanted == in_pieces(found(place))


def test_bytes_that_are_fetched(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """JSON lines are fetched once, by several requests, besides their first 64 KiB."""
    monkeypatch.setattr(interface, "PIECE_BYTES", 1 << 18)
    monkeypatch.setattr(remote_files, "RANGE_BYTES", 1 << 18)
    server.files = {"raw.jsonl": json_lines(rows(0, 40_000))}
    corpus = found(f"{server.url}/raw.jsonl")
    vars(corpus)["form"] = found(stored(tmp_path / "parts", server.files)).form
    server.forget()
    assert len(list(corpus.read())) == 40_000
    size = len(server.files["raw.jsonl"])
    assert size <= server.sent["raw.jsonl"] <= size + (1 << 16)
    assert len(server.requests) == size // (1 << 18) + 1
    last = list(corpus.pieces())[-2]
    server.forget()
    assert len(list(corpus.read(last))) > 1000
    assert server.sent["raw.jsonl"] == last.end - last.begin


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "json", "parquet"])
def test_little_is_fetched_to_recognise_the_shape(
    server: Server, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    for module, name, value in (
        (remote_files, "FIRST_BYTES", 1 << 17),
        (columnar, "FIRST_BYTES", 1 << 17),
        (remote_files, "RANGE_BYTES", 1 << 19),
        (interface, "PIECE_BYTES", 1 << 19),
    ):
        monkeypatch.setattr(module, name, value)
    made = [{"query": row["question"], "positives": row["reply"]} for row in rows(0, 40_000)]
    kinds = {**MAKE, "json": lambda made: json.dumps(made, indent=1).encode()}
    raw = parquet(made, 40_000) if kind == "parquet" else kinds[kind](made)
    server.files = {f"raw.{kind}": raw}
    corpus = find(SourceConfig(path=f"{server.url}/raw.{kind}", license="CC0"))
    server.forget()
    assert corpus.form.shape == "pairs"
    # Its first 64 KiB are looked at before; of Parquet, footer and pages are read.
    most = len(raw) - 1 if kind == "parquet" else (1 << 16) + min(1 << 17, len(raw))
    assert most // 2 < server.sent[f"raw.{kind}"] <= most


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize("fault", ["half", "503"])
def test_connections_that_drop(tmp_path: Path, server: Server, kind: str, fault: str) -> None:
    """Each range is requested again from where it broke off."""
    server.files = corpus_files(kind)
    wanted = plain(found(stored(tmp_path / "parts", server.files)).read())
    server.once = fault
    assert plain(found(f"{server.url}/part-{{0..4}}.{kind}").read()) == wanted
    assert {name for name, _ in server.broken} == set(server.files)


def test_a_server_that_does_not_recover(tmp_path: Path, server: Server) -> None:
    """It is named with the file; what was read before need not be fetched again."""
    server.files = corpus_files("jsonl")
    wanted = plain(found(stored(tmp_path / "parts", server.files)).read())
    corpus = found(f"{server.url}/part-{{0..4}}.jsonl")
    _ = corpus.form
    pieces, done = corpus.pieces(data=True), []
    for _ in range(3):
        last = next(pieces)
        done += plain(corpus.read(last))
    server.always = "half"
    with pytest.raises(EnvironmentProblem, match=r"part-\d.jsonl: .*truncated.*; try again later"):
        list(pieces)
    server.always = "503"
    with pytest.raises(EnvironmentProblem, match=r"part-0.jsonl: .*HTTP 503"):
        list(corpus.read())
    server.always = ""
    server.forget()
    again = corpus.pieces(last, data=True)
    assert next(again) == last
    assert done + [one for piece in again for one in plain(corpus.read(piece))] == wanted
    assert min(begin for name, begin, _ in server.requests if name == "part-0.jsonl") == last.begin


@pytest.mark.parametrize("kind", MAKE)
def test_pieces_from_any_piece_on(tmp_path: Path, server: Server, kind: str) -> None:
    server.files = corpus_files(kind)
    folder = stored(tmp_path / "parts", server.files)
    for corpus in (found(folder), found(f"{server.url}/part-{{0..4}}.{kind}")):
        pieces = list(corpus.pieces())
        for place, piece in enumerate(pieces):
            assert list(corpus.pieces(piece)) == pieces[place:]


def test_a_server_without_ranges(tmp_path: Path, server: Server) -> None:
    """One file is downloaded; of several files the first is named."""
    server.files, server.ranges = corpus_files("jsonl"), False
    corpus = found(f"{server.url}/part-0.jsonl")
    assert isinstance(corpus.path, Path)
    assert len(list(corpus.read())) == 120
    with pytest.raises(EnvironmentProblem, match=r"part-0.jsonl: the server sends no ranges"):
        found(f"{server.url}/part-{{0..4}}.jsonl")


def test_what_is_downloaded(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small files, those with a hash, those that were downloaded before, and other formats."""
    server.files = {"a.jsonl": json_lines(rows(0, 30)), "a.csv": b"question,reply\na,b\n"}
    assert not isinstance(found(f"{server.url}/a.jsonl").path, Path)
    assert isinstance(found(f"{server.url}/a.csv").path, Path)
    monkeypatch.setattr(sources, "WHOLE_BYTES", len(server.files["a.jsonl"]))
    assert isinstance(found(f"{server.url}/a.jsonl").path, Path)
    monkeypatch.setattr(sources, "WHOLE_BYTES", 0)
    server.forget()
    assert isinstance(found(f"{server.url}/a.jsonl").path, Path)
    assert server.requests == []


def test_a_file_that_changes(tmp_path: Path, server: Server) -> None:
    server.files = corpus_files("jsonl")
    folder = stored(tmp_path / "parts", server.files)
    corpus = found(f"{server.url}/part-{{0..4}}.jsonl")
    read = corpus.read()
    next(read)
    server.tag = '"v2"'
    with pytest.raises(EnvironmentProblem, match=r"part-\d.jsonl: the file has changed while"):
        list(read)
    corpus = found(f"file://{folder}")
    assert len(list(corpus.read())) == 230
    (folder / "part-3.jsonl").write_bytes(server.files["part-2.jsonl"])
    with pytest.raises(EnvironmentProblem, match=r"part-3.jsonl: the file has changed while"):
        corpus.check_unchanged()


def test_addresses(tmp_path: Path, server: Server) -> None:
    server.files = corpus_files("jsonl")
    (tmp_path / "a.csv").write_text("question,reply\na,b\n")
    with pytest.raises(DataError, match=r"file:///nowhere/x.jsonl: no such file"):
        found("file:///nowhere/x.jsonl")
    with pytest.raises(DataError, match=r"part-5.jsonl: the server has no such file"):
        found(f"{server.url}/part-{{3..5}}.jsonl")
    with pytest.raises(ConfigError, match="format csv cannot be read from this address; download"):
        found(f"file://{tmp_path}/a.csv")
    with pytest.raises(ConfigError, match="no such kind of address"):
        found("nosuch://bucket/a.jsonl")


def test_a_truncated_file_among_others(tmp_path: Path, server: Server) -> None:
    """It is one invalid row, and all other files are read: as on this disk."""
    server.files = corpus_files("parquet", 20)
    server.files["part-7.parquet"] = server.files["part-7.parquet"][:-20]
    folder = stored(tmp_path / "parts", server.files)
    for place in (f"{server.url}/part-{{0..19}}.parquet", f"file://{folder}"):
        read = plain(found(place).read())
        (lost,) = [one for one in read if one[0] != "{"]
        assert lost.startswith("part-7.parquet: not readable as parquet after row 0")
        assert lost.endswith("the rest of this file is lost, so restore it")
        assert sorted(read) == sorted(plain(found(folder).read()))


def shards(folder: Path, place: str | Path) -> dict[str, bytes]:
    """Prepare a source into a folder; return its shards."""
    source = found(place).source.model_dump()
    prepare(DataConfig.model_validate({"folder": folder, "sources": [source]}), 0)
    files = (file for file in folder.rglob("*") if file.suffix in (".tar", ".idx"))
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def test_the_shards_are_the_same(tmp_path: Path, server: Server) -> None:
    """Prepared from this disk, in ranges over HTTP, and through fsspec: byte for byte."""
    server.files = corpus_files("jsonl")
    folder = stored(tmp_path / "parts", server.files)
    first = shards(tmp_path / "local", folder)
    assert len(first) > 3
    for number, place in enumerate((f"{server.url}/part-{{0..4}}.jsonl", f"file://{folder}")):
        other = shards(tmp_path / str(number), place)
        assert [name for name in first if first[name] != other.get(name)] == []
        assert first.keys() == other.keys()


def test_several_nodes_fetch_many_files_once(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Node 0 does not fetch them to find line ends."""
    monkeypatch.setattr(sources, "MANY_FILES", 5)
    server.files = corpus_files("jsonl")
    wanted = shards(tmp_path / "local", stored(tmp_path / "parts", server.files))
    data = tmp_path / "data"
    with engine.leading(data, Spread(3)):
        assert shards(data, f"{server.url}/part-{{0..4}}.jsonl") == wanted
    for number in range(1, 5):  # of the first file the shape is recognised
        name = f"part-{number}.jsonl"
        # It is found twice, by a request for one byte; then its head is looked at, and it is read.
        assert server.sent[name] == 2 + 2 * len(server.files[name])


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_prepare_resumes_where_the_server_failed(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Pieces that are stored are not read again, and the shards are those of this disk."""
    monkeypatch.setattr(process_pool, "cores", lambda: 1)  # other processes wait for seconds
    server.files = corpus_files(kind)
    folder = stored(tmp_path / "parts", server.files)
    wanted, total = shards(tmp_path / "local", folder), len(list(found(folder).pieces()))
    read, runs = Corpus.read, [[]]

    def recorded(corpus: Corpus, piece: Piece) -> Any:
        yield from read(corpus, piece)
        runs[-1].append(piece.number)

    monkeypatch.setattr(Corpus, "read", recorded)
    place = f"{server.url}/part-{{0..4}}.{kind}"
    server.left = {"jsonl": 44, "parquet": 18}[kind]
    with pytest.raises(EnvironmentProblem, match=rf"part-\d.{kind}: .*HTTP 503"):
        shards(tmp_path / "data", place)
    server.left = 1 << 30
    runs.append([])
    assert shards(tmp_path / "data", place) == wanted
    assert len(runs[0]) > 3
    assert runs[0] + runs[1] == list(range(total))


@pytest.mark.suites
def test_s3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server of moto: patterns, folders and files; versions are ETags."""
    pytest.importorskip("s3fs")
    server = pytest.importorskip("moto.server").ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        for name, value in {
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
            "AWS_ACCESS_KEY_ID": "none",
            "AWS_SECRET_ACCESS_KEY": "none",
            "AWS_DEFAULT_REGION": "us-east-1",
        }.items():
            monkeypatch.setenv(name, value)
        bucket, _ = remote_files.filesystem("s3://bucket/")
        bucket.mkdir("bucket")
        for kind in MAKE:
            files = corpus_files(kind)
            folder = stored(tmp_path / kind, files)
            wanted = plain(found(folder).read())
            for name, raw in files.items():
                bucket.pipe_file(f"bucket/{kind}/{name}", raw)
            for place in (f"s3://bucket/{kind}/", f"s3://bucket/{kind}/part-*.{kind}"):
                corpus = found(place)
                assert plain(corpus.read()) == wanted == in_pieces(corpus)
                corpus.check_unchanged()
            one = found(f"s3://bucket/{kind}/part-3.{kind}")
            assert plain(one.read()) == plain(found(folder / f"part-3.{kind}").read())
            bucket.pipe_file(f"bucket/{kind}/part-3.{kind}", files[f"part-2.{kind}"])
            with pytest.raises(EnvironmentProblem, match=rf"part-3.{kind}: the file has changed"):
                one.check_unchanged()
        with pytest.raises(DataError, match=r"s3://bucket/nothing.jsonl: no such file"):
            found("s3://bucket/nothing.jsonl")
    finally:
        server.stop()
