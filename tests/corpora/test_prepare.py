"""raw -> splits -> shards: nothing leaks, groups stay whole, counts are true, bytes repeat."""

from __future__ import annotations

import errno
import json
import math
import random
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from lbr_ds.config import DataConfig
from lbr_ds.corpora.curate.cleaning import clean
from lbr_ds.corpora.curate.groups import draws
from lbr_ds.corpora.curate.segmentation import normalise
from lbr_ds.corpora.curate.splits import share_out
from lbr_ds.corpora.prepare import prepare
from lbr_ds.corpora.store import Store
from lbr_ds.errors import ConfigError, DataError, EnvironmentProblem
from lbr_ds.evaluation.judgements import read_held_out
from tests.corpora.toy import pair, read_all, recipe, write_raw

NO_LEAKS = {"eval_gl": 0, "eval_cl": 0, "near_eval_gl": 0, "near_eval_cl": 0}


def everything(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def many(count: int = 200) -> list[dict[str, Any]]:
    """Records of which every fifth shares a group."""
    return [pair(i, **({"group": f"g{i // 20}"} if i % 5 == 0 else {})) for i in range(count)]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Yellow  Fever", "yellow fever"),
        ("Crohn's disease", "crohn\u2019s DISEASE!"),
        ("non-small cell", "non small-cell"),
        ("caf\u00e9", "cafe\u0301"),
        ("\ufb01brosis", "fibrosis"),
        ("Stra\u00dfe", "STRASSE"),
        ("in\u00advisible", "invisible\u200b"),
    ],
)
def test_normalise_sees_through(one: str, other: str) -> None:
    assert normalise(one) == normalise(other)


def test_normalise_keeps_what_differs() -> None:
    for one, other in [("Na+", "Na"), ("x < 5", "x > 5"), ("...", "?!"), ("a b", "ab")]:
        assert normalise(one) != normalise(other)


def test_clean() -> None:
    assert clean(" cafe\u0301\t is\n\n open ") == "caf\u00e9 is open"


def planted() -> list[dict[str, Any]]:
    """Pairs of records that must not part: the same words in other clothes."""
    raws = []
    for i in range(0, 120, 4):
        raws += [
            pair(i),
            pair(i + 1, query=f"QUESTION   {i}!"),  # the same question
            pair(i + 2, positives=[f"  Answer-{i}.", f"more {i}"]),  # a shared answer
            pair(i + 3, query=f"answer: {i}"),  # a question that is another's answer
        ]
    return raws + [{"id": f"p{i}", "text": f"Answer, {i}"} for i in range(0, 60, 4)]


def test_planted_leaks_never_cross(tmp_path: Path) -> None:
    data = recipe(tmp_path, planted())
    made = prepare(data, 0)
    splits = read_all(data.folder)
    texts = {
        name: {normalise(text) for record in records for text in record.texts()}
        for name, records in splits.items()
    }
    assert not texts["eval"] & (texts["gl"] | texts["cl"])
    assert not texts["cl"] & texts["gl"]
    assert made["leaks"] == NO_LEAKS
    assert made["components"] == {
        "count": 30,
        "largest": 5,
        "most_shared": "answer 0",
        "shared_by": 4,
        "tied_records": 135,
        "near_duplicate_texts": 0,
    }


def test_negatives_never_carry_eval_over(tmp_path: Path) -> None:
    raws = [
        pair(i, negatives=[f"Answer {(i + 1) % 100}", f"Question, {(i + 7) % 100}", "Other"])
        for i in range(100)
    ]
    data = recipe(tmp_path, raws)
    made = prepare(data, 0)
    assert made["leaks"] == NO_LEAKS
    records = [record for split in read_all(data.folder).values() for record in split]
    kept = sum(len(record.negatives) for record in records)
    removed = made["dropped_texts"]["negative_is_in_other_split"]
    assert removed["count"] == 300 - kept > 15  # "Other" alone is removed 85 times
    assert len(removed["examples"]) == 3


def test_negatives_that_are_answers_of_the_group(tmp_path: Path) -> None:
    raws = [pair(i) for i in range(20)]
    raws += [pair(20, group="g", negatives=["ANSWER 21", "wrong"]), pair(21, group="g")]
    data = recipe(tmp_path, raws)
    made = prepare(data, 0)
    record = next(r for rs in read_all(data.folder).values() for r in rs if r.id == "r20")
    assert record.negatives == ["wrong"]
    assert made["dropped_texts"] == {
        "negative_is_a_positive": {"count": 1, "examples": ["r20: ANSWER 21"]}
    }


def test_proof_is_counted_from_the_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When dividing goes wrong, the proof and not a user finds it, and nothing is left."""

    def apart(store: Store, seed: int) -> None:
        store.db.execute("INSERT INTO members SELECT seq, seq, seq FROM records")
        store.db.execute("INSERT INTO groups SELECT grp, 'c' || grp FROM members")
        store.define("drawn", draws(seed))
        store.db.execute("INSERT INTO components SELECT grp, label, drawn(label), 1, 1 FROM groups")

    monkeypatch.setattr("lbr_ds.corpora.prepare.group_records", apart)
    with pytest.raises(DataError, match="eval shares texts with training"):
        prepare(recipe(tmp_path, planted()), 0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["raw.jsonl"]


def test_each_component_goes_where_there_is_room_first(tmp_path: Path) -> None:
    """As a loop over the components does it, one by one."""
    draw = np.random.RandomState(0)
    components = draw.permutation(400).astype(np.int32)
    sizes = draw.geometric(0.3, (3, 400)).astype(np.int32) - 1
    rooms = {"eval": 50.0, "cl": 211.0, "gl": math.inf}
    left, expected = dict(rooms), []
    for place, component in enumerate(components.tolist()):
        for name, own in zip(rooms, sizes[:, place].tolist(), strict=True):
            if 0 < own <= left[name]:
                left[name] -= own
                expected.append((component, name))
                break
    with closing(Store(tmp_path)) as store:
        splits = dict(zip(rooms, zip(sizes, rooms.values(), strict=True), strict=True))
        got = share_out(store, components, splits)
        assert sorted(store.rows("FROM shares")) == sorted(expected)
    assert (got["eval"], got["cl"]) == (50 - left["eval"], 211 - left["cl"])
    assert {name for _, name in expected} == set(rooms)
    assert len(expected) < 400


def test_groups_stay_whole(tmp_path: Path) -> None:
    data = recipe(tmp_path, many())
    prepare(data, 0)
    splits = read_all(data.folder)
    owners: dict[str, set[str]] = {}
    for name, records in splits.items():
        for record in records:
            owners.setdefault(record.group, set()).add(name)
    assert all(len(names) == 1 for names in owners.values())
    assert set(owners) >= {f"g{i}" for i in range(10)}
    assert len(owners) == 10 + 160  # records without a group got one of their own


def test_one_group_a_component(tmp_path: Path) -> None:
    raws = [pair(i) for i in range(30)]
    raws += [pair(30, group="b"), pair(31, group="a", query="Question 30"), pair(32, group="b")]
    data = recipe(tmp_path, raws)
    prepare(data, 0)
    groups = {r.id: r.group for records in read_all(data.folder).values() for r in records}
    assert [groups[f"r{i}"] for i in (30, 31, 32)] == ["a"] * 3


def test_same_seed_same_bytes_whatever_the_order_of_lines(tmp_path: Path) -> None:
    raws = many()
    made = prepare(recipe(tmp_path, raws, records_per_shard=32), 7)
    files = everything(tmp_path / "data")
    assert "gl/00003.tar" in files
    prepare(recipe(tmp_path, raws, records_per_shard=32, folder=tmp_path / "again"), 7)
    assert everything(tmp_path / "again") == files
    random.Random(0).shuffle(raws)
    prepare(recipe(tmp_path, raws, records_per_shard=32, folder=tmp_path / "other"), 7)
    tars = {name: raw for name, raw in files.items() if name.endswith(".tar")}
    other = everything(tmp_path / "other")
    assert {name: raw for name, raw in other.items() if name.endswith(".tar")} == tars
    seeded = prepare(recipe(tmp_path, raws, folder=tmp_path / "seed"), 8)
    assert seeded["splits"]["eval"]["samples"] != made["splits"]["eval"]["samples"]


def test_curation_equals_a_recount(tmp_path: Path) -> None:
    raws: list[dict[str, Any] | str] = [*many(), "{", {**pair(3), "query": "other"}]
    raws += [pair(300, query="x"), pair(301, positives=["y" * 99]), pair(302, query="Question-5")]
    raws += [pair(303, query="question 3", positives=["Answer: 3"])]  # the one true duplicate
    raws += [pair(400 + i, source="own") for i in range(10)]
    data = recipe(tmp_path, raws, min_chars=2, max_chars=50, on_error="skip")
    made = prepare(data, 0)
    assert made == {**json.loads((data.folder / "curation.json").read_text()), "reused": False}
    dropped = {rule: entry["count"] for rule, entry in made["dropped_records"].items()}
    expected = dict.fromkeys(
        ["bad_record", "duplicate_id", "duplicate", "too_long", "too_short"], 1
    )
    assert dropped == expected
    (source,) = made["sources"]
    assert (source["records_read"], source["records_kept"]) == (len(raws), len(raws) - 5)
    assert (source["name"], source["license"]) == ("toy", "CC0")
    splits = read_all(data.folder)
    for name, records in splits.items():
        told = made["splits"][name]
        assert told["records"] == len(records)
        assert told["components"] == len({record.group for record in records})
        assert sum(told["by_source"].values()) == len(records)
        lengths = sorted(len(record.query) for record in records)
        assert told["characters"]["query"]["min"] == lengths[0]
        assert told["characters"]["query"]["max"] == lengths[-1]
        samples = {json.dumps(sample, sort_keys=True) for sample in told["samples"]}
        assert len(samples) == 4
    assert sum(len(records) for records in splits.values()) == len(raws) - 5
    assert made["splits"]["eval"]["by_source"].keys() <= {"toy", "own"}


def sizes(data: DataConfig) -> dict[str, int]:
    return {name: len(records) for name, records in read_all(data.folder).items()}


def test_shares_and_counts(tmp_path: Path) -> None:
    raws = [pair(i) for i in range(200)]
    shares = recipe(tmp_path, raws, splits={"gl": 0.55, "cl": 0.35, "eval": 0.1})
    prepare(shares, 0)
    assert sizes(shares) == {"gl": 110, "cl": 70, "eval": 20}
    half = recipe(tmp_path, raws, splits={"gl": 0.25, "cl": 0.15, "eval": 0.1})
    assert prepare(half, 0)["dropped_records"]["beyond_the_sizes"]["count"] == 100
    assert sizes(half) == {"gl": 50, "cl": 30, "eval": 20}
    counts = recipe(tmp_path, raws, splits={"gl": 100, "cl": 33, "eval": 5})
    prepare(counts, 0)
    assert sizes(counts) == {"gl": 100, "cl": 33, "eval": 5}
    short = recipe(tmp_path, raws, splits={"gl": 190, "cl": 10, "eval": 5})
    message = r"data\.splits\.gl=190 cannot be filled \(got 185\).* there are 200 records in 200"
    with pytest.raises(DataError, match=message):
        prepare(short, 0)
    assert sizes(counts) == {"gl": 100, "cl": 33, "eval": 5}  # the folder of before stands


def test_one_component_cannot_be_divided(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"10 records in 1 set\(s\) of linked .*has 10 \(g\)"):
        prepare(recipe(tmp_path, [pair(i, group="g") for i in range(10)]), 0)
    raws = [pair(i, positives=["Yes."] if i < 9 else ["yes", "sure"]) for i in range(10)]
    with pytest.raises(DataError, match=r"the largest has 10 .*, and 10 of them contain 'Yes\.'"):
        prepare(recipe(tmp_path, raws), 0)


def test_passages_go_to_gl(tmp_path: Path) -> None:
    raws = [pair(i) for i in range(40)] + [{"text": f"passage {i}"} for i in range(60)]
    raws += [{"text": f"Answer {i}."} for i in range(40)]  # each belongs with a pair
    data = recipe(tmp_path, raws, splits={"gl": 0.5, "cl": 0.25, "eval": 0.25})
    dropped = prepare(data, 0)["dropped_records"]
    assert sizes(data) == {"gl": 20 + 20 + 60, "cl": 10, "eval": 10}
    assert {rule: entry["count"] for rule, entry in dropped.items()} == {
        "passage_in_cl": 10,
        "passage_in_eval": 10,
    }


def test_passages_alone_are_divided(tmp_path: Path) -> None:
    data = recipe(tmp_path, [{"text": f"passage {i}"} for i in range(100)])
    prepare(data, 0)
    assert sizes(data) == {"gl": 60, "cl": 25, "eval": 15}


def test_max_records_and_two_sources(tmp_path: Path) -> None:
    first = recipe(tmp_path, map(pair, range(50))).sources[0]
    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps({"text": f"t{i}"}) + "\n" for i in range(9)))
    sources = [{**first.model_dump(), "max_records": 30}, {"path": str(other)}]
    data = recipe(tmp_path, map(pair, range(50)), sources=sources)
    made = prepare(data, 0)
    assert [source["records_read"] for source in made["sources"]] == [30, 9]
    assert made["splits"]["gl"]["by_source"]["other"] == 9


def test_reused_unless_something_changed(tmp_path: Path) -> None:
    stages: list[str] = []
    data = recipe(tmp_path, many())
    made = prepare(data, 0)
    stamp = (data.folder / "manifest.json").stat().st_mtime_ns

    again = prepare(data, 0, lambda stage, done, total: stages.append(stage))
    assert again == {**made, "reused": True}
    assert stages == []  # nothing is read
    assert (data.folder / "manifest.json").stat().st_mtime_ns == stamp

    assert not prepare(data, 1)["reused"]
    assert not prepare(recipe(tmp_path, many(), min_chars=3), 1)["reused"]
    assert not prepare(recipe(tmp_path, many(201), min_chars=3), 1)["reused"]
    (data.folder / "gl" / "00000.tar").unlink()
    assert not prepare(recipe(tmp_path, many(201), min_chars=3), 1)["reused"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "raw.jsonl"]


def test_foreign_folders_are_refused(tmp_path: Path) -> None:
    data = recipe(tmp_path, many())
    data.folder.mkdir()
    prepare(data, 0)  # an empty folder is no one's
    (data.folder / "gl" / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="'gl' is not all from lbr-ds; choose another"):
        prepare(data, 1)
    (data.folder / "manifest.json").unlink()
    with pytest.raises(ConfigError, match=r"no manifest\.json; choose another data\.folder"):
        prepare(data, 1)
    assert (data.folder / "gl" / "notes.txt").read_text() == "mine"
    file = recipe(tmp_path, many(), folder=tmp_path / "raw.jsonl")
    with pytest.raises(ConfigError, match="is a file"):
        prepare(file, 0)


def test_full_disk_leaves_the_old_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = recipe(tmp_path, many())
    prepare(data, 0)
    before = everything(data.folder)

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr("lbr_ds.corpora.prepare.write_split", full)
    with pytest.raises(EnvironmentProblem, match="data: no space is left on the disk"):
        prepare(data, 1)
    assert everything(data.folder) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "raw.jsonl"]


def test_a_source_of_role_eval_only_evaluates(tmp_path: Path) -> None:
    """Eval is made of it alone, and what shares a text or group with eval trains nothing."""
    passages = [{"text": f"Answer {i}.", "group": f"d{i}"} for i in range(100)]
    passages += [{"text": f"passage {i}", "group": f"d{i}"} for i in range(100)]
    questions = write_raw(tmp_path / "questions.jsonl", map(pair, range(90, 130)))
    data = recipe(tmp_path, passages, splits={"gl": 0.45, "cl": 0.45, "eval": 0.1})
    asked = {"path": str(questions), "name": "questions", "role": "eval"}
    data = data.model_copy(
        update={"sources": [*data.sources, type(data.sources[0]).model_validate(asked)]}
    )
    made = prepare(data, 0)
    found = read_all(tmp_path / "data")
    assert {r.source for r in found["eval"]} == {"questions"}
    assert len(found["eval"]) == 20  # a tenth of the 200 that train
    assert {r.source for r in (*found["gl"], *found["cl"])} == {"toy"}
    # d90 to d99 have an answer that eval's component has, if the question is there.
    linked = {r.id.removeprefix("r") for r in found["eval"]} & set(map(str, range(90, 100)))
    assert linked
    held_out = {f"d{number}" for number in linked}
    assert not held_out & {r.group for r in (*found["gl"], *found["cl"])}
    assert len(found["gl"]) + len(found["cl"]) == 200 - 2 * len(linked)
    left = {rule: entry["count"] for rule, entry in made["dropped_records"].items()}
    assert left["linked_to_eval"] == 2 * len(linked)
    assert left.get("linked_to_training", 0) + left["beyond_the_sizes"] == 20
    assert set(made["leaks"].values()) == {0}
    assert len(read_held_out(tmp_path / "data")[0].judged.queries) == 20


def test_role_eval_stays_beside_an_equal_training_pair(tmp_path: Path) -> None:
    """The pair that trains is dropped, whatever was read first."""
    questions = write_raw(tmp_path / "q.jsonl", [pair(i, id=f"q{i}") for i in range(20)])
    data = recipe(tmp_path, map(pair, range(100)), splits={"gl": 0.4, "cl": 0.3, "eval": 0.3})
    asked = {"path": str(questions), "name": "questions", "role": "eval"}
    kind = type(data.sources[0])
    data = data.model_copy(update={"sources": [*data.sources, kind.model_validate(asked)]})
    made = prepare(data, 0)
    assert sizes(data) == {"gl": 50, "cl": 30, "eval": 20}
    assert made["dropped_records"]["linked_to_eval"]["count"] == 20


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"protocol": "knowledge"}, "role eval needs protocol=random"),
        ({"sources": []}, "all sources have role eval, so there is nothing to train on"),
    ],
)
def test_role_eval_where_it_cannot_be(change: dict[str, Any], message: str) -> None:
    sources = [{"path": "a.jsonl", "role": "eval"}, *change.pop("sources", [{"path": "b.jsonl"}])]
    with pytest.raises(ValidationError, match=message):
        DataConfig.model_validate({"folder": "data", "sources": sources, **change})
