"""The knowledge split against a reading of its table by hand; what leaks is found."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest

from lbr_ds.config import DataConfig, load
from lbr_ds.corpora.curate import knowledge, leaks
from lbr_ds.corpora.curate.segmentation import normalise
from lbr_ds.corpora.prepare import prepare
from lbr_ds.corpora.store import Store
from lbr_ds.errors import ConfigError, DataError
from lbr_ds.records import Record
from lbr_ds.shards import Manifest, read_split
from tests.corpora.toy import pair, write_raw
from tests.tiny import edit_manifest, tiny_recipe

NAMES = ("gl", "cl", "eval", "control")
WORDS = [a + b for a in ("bro", "cla", "dri", "fen", "gos", "hul") for b in ("lo", "ma", "ti")]


def words(seed: str, count: int) -> str:
    """Words by a seed, so that no two texts are near."""
    return " ".join(random.Random(seed).choices(WORDS, k=count)) + f" {seed}"


def fact(entity: int, **fields: Any) -> dict[str, Any]:
    return {
        "id": f"f{entity}",
        "query": f"What is {words(f'name{entity}', 3)}?",
        "positives": [words(f"fact{entity}", 8)],
        "group": f"e{entity}",
        **fields,
    }


def asked(entity: int, number: int = 0, **fields: Any) -> dict[str, Any]:
    return pair(
        f"{entity}-{number}",
        query=words(f"asked{entity}-{number}", 3),
        positives=[words(f"passage{entity}", 9)],
        **{"group": f"e{entity}", **fields},
    )


def recipe(folder: Path, sources: dict[str, list[dict[str, Any]]], **fields: Any) -> DataConfig:
    """sources: {role or role-N: records}."""
    folder.mkdir(parents=True, exist_ok=True)
    listed = [
        {
            "path": str(write_raw(folder / f"{role}.jsonl", raws)),
            "role": role.split("-")[0],
            "name": role,
        }
        for role, raws in sources.items()
    ]
    return DataConfig.model_validate(
        {"folder": folder / "data", "sources": listed, "protocol": "knowledge", **fields}
    )


def read(data: DataConfig) -> dict[str, list[Record]]:
    return {name: list(read_split(data.folder, name)) for name in NAMES}


def groups(records: list[Record], prefix: str = "") -> set[str]:
    return {record.group for record in records if record.id.startswith(prefix)}


def test_every_entity_has_its_place(tmp_path: Path) -> None:
    """60 entities with a fact and two pairs each, 5 with facts alone, 3 with pairs alone."""
    facts = [fact(n) for n in range(65)]
    pairs = [asked(n, k) for n in [*range(60), 70, 71, 72] for k in (0, 1)]
    passages = [{"id": f"t{n}", "text": words(f"text{n}", 9)} for n in range(4)]
    sizes = {"cl": 0.5, "eval": 0.3, "control": 0.2}
    data = recipe(tmp_path, {"fact": facts + passages, "pair": pairs}, splits=sizes)
    made = prepare(data, 0)
    splits = read(data)
    a, b, c = (groups(splits[name]) for name in NAMES[1:])
    assert (len(a), len(b), len(c)) == (30, 18, 12)
    assert not a & b | b & c | a & c
    alone = {f"e{n}" for n in range(60, 65)}
    assert groups(splits["gl"], "f") == a | b | alone
    assert sum(record.id.startswith("t") for record in splits["gl"]) == 4
    assert {record.id for name in NAMES[1:] for record in splits[name]} == {
        f"r{n}-{k}" for n in range(60) for k in (0, 1)
    }
    assert len(splits["gl"]) == 30 + 18 + 5 + 4
    dropped = {rule: entry["count"] for rule, entry in made["dropped_records"].items()}
    assert dropped == {"pair_without_fact": 6, "fact_of_control": 12}
    assert made["protocol"] == "knowledge"
    assert made["entities"] == {"cl": 30, "eval": 18, "control": 12, "gl": 53, "gl_facts_only": 5}
    assert made["eval_texts_in_gl"] == dict.fromkeys(
        ("queries", "passages", "near_queries", "near_passages"), 0
    )
    assert [made["splits"][name]["requested"] for name in NAMES] == [None, 0.5, 0.3, 0.2]
    assert set(made["leaks"].values()) == {0}
    assert set(made["leaks"]) == {
        f"{kind}{apart}"
        for kind in ("", "near_", "group_")
        for apart in ("eval_cl", "control_cl", "control_gl")
    } | {"eval_gl", "near_eval_gl"}
    assert Manifest.load(data.folder).protocol == "knowledge"
    assert prepare(data, 0)["reused"]
    assert groups(read_after(data, 1)["eval"]) != b


def read_after(data: DataConfig, seed: int) -> dict[str, list[Record]]:
    prepare(data, seed)
    return read(data)


def test_what_shares_a_text_is_on_one_side(tmp_path: Path) -> None:
    """Entities in a chain of equal and near texts of facts and pairs stay together."""
    facts = [fact(n) for n in range(60)]
    pairs = [asked(n) for n in range(60)]
    tied = []
    for n in range(0, 30, 3):
        pairs[n + 1]["positives"] = [facts[n]["positives"][0].upper() + "!"]  # a fact that is asked
        long = words(f"long{n}", 40)
        facts[n + 1]["positives"] = [long]
        facts[n + 2]["positives"] = [long.replace("lo", "la", 1)]  # nearly the same fact
        tied.append({f"e{n}", f"e{n + 1}", f"e{n + 2}"})
    data = recipe(
        tmp_path, {"fact": facts, "pair": pairs}, splits={"cl": 0.4, "eval": 0.3, "control": 0.3}
    )
    made = prepare(data, 3)
    splits = read(data)
    sides = [{r.id for r in splits[name]} for name in NAMES[1:]]
    assert all(sides)
    for three in tied:
        ids = {f"r{name[1:]}-0" for name in three}
        assert sum(ids <= side for side in sides) == 1, three
    texts = {n: {normalise(t) for r in rs for t in r.texts()} for n, rs in splits.items()}
    assert not texts["control"] & (texts["gl"] | texts["cl"] | texts["eval"])
    assert not texts["eval"] & texts["cl"]
    shared = texts["eval"] & texts["gl"]
    assert made["eval_texts_in_gl"]["passages"] == len(shared) > 0
    # `prove` needs the shards alone, so it says nothing of eval and gl.
    assert leaks.prove_no_equal_texts(data.folder) == {
        "eval_cl": 0,
        "control_gl": 0,
        "control_cl": 0,
    }


def test_a_fact_may_be_what_is_asked(tmp_path: Path) -> None:
    """The same records as facts and as pairs: told in gl word by word, of their entity alone."""
    raws = [asked(n) for n in range(40)]
    data = recipe(tmp_path, {"fact": [{**r, "id": f"f-{r['id']}"} for r in raws], "pair": raws})
    made = prepare(data, 0)
    assert made["entities"]["eval"] == 8 == made["splits"]["eval"]["records"]
    assert made["eval_texts_in_gl"] == dict.fromkeys(
        ("queries", "passages", "near_queries", "near_passages"), 8
    )
    assert "duplicate" not in made["dropped_records"]
    assert set(made["leaks"].values()) == {0}


def test_one_source_for_both(tmp_path: Path) -> None:
    """Of an entity's records one is the fact, in any order of lines; one alone is reported."""
    raws = [asked(n, k) for n in range(40) for k in range(1 + n % 3)]
    data = recipe(tmp_path / "one", {"both": raws})
    made = prepare(data, 5)
    splits = read(data)
    gl = [record.id for record in splits["gl"]]
    rest = {record.id for name in NAMES[1:] for record in splits[name]}
    outside = made["dropped_records"]["fact_of_control"]["count"]
    assert outside == len(groups(splits["control"])) > 0
    assert len(gl) == len(groups(splits["gl"])) == 40 - outside
    assert len(gl) + len(rest) + outside == len(raws)
    assert {name for name in gl if int(name[1:].split("-")[0]) % 3 == 0} == {
        f"r{n}-0" for n in range(0, 40, 3)
    }
    assert any(not name.endswith("-0") for name in gl)
    random.Random(1).shuffle(raws)
    other = recipe(tmp_path / "other", {"both": raws})
    prepare(other, 5)
    for name in NAMES:
        for shard in Manifest.load(data.folder).shards(name):
            one, two = (
                (folder / shard.file).read_bytes() for folder in (data.folder, other.folder)
            )
            assert one == two


def test_same_bytes_twice_and_counts(tmp_path: Path) -> None:
    sources = {"fact": [fact(n) for n in range(50)], "pair": [asked(n) for n in range(50)]}
    data = recipe(tmp_path, sources, splits={"cl": 20, "eval": 7, "control": 5})
    made = prepare(data, 0)
    assert [made["splits"][name]["records"] for name in NAMES] == [27, 20, 7, 5]
    assert made["dropped_records"]["beyond_the_sizes"]["count"] == 2 * 18
    files = {p: p.read_bytes() for p in data.folder.rglob("*") if p.is_file()}
    edit_manifest(data.folder, lambda raw: raw.update(fingerprint="0" * 16))
    assert not prepare(data, 0)["reused"]
    assert {p: p.read_bytes() for p in data.folder.rglob("*") if p.is_file()} == files
    short = recipe(tmp_path, sources, splits={"cl": 40, "eval": 7, "control": 5})
    with pytest.raises(DataError, match=r"data\.splits\.cl=40 cannot be filled \(got 38\)"):
        prepare(short, 0)


@pytest.mark.parametrize(
    ("sql", "found"),
    [
        # A pair of cl put into eval's entity: its group and its passage are on both sides.
        (
            "UPDATE placed SET split = 'cl' WHERE seq IN (SELECT seq FROM placed"
            " WHERE split = 'eval' ORDER BY seq LIMIT 1)",
            ("eval_cl", "group_eval_cl"),
        ),
        # A fact of the control told after all: its group is.
        (
            "INSERT INTO placed SELECT seq, component, 'gl' FROM members WHERE seq NOT IN"
            " (SELECT seq FROM placed) LIMIT 1",
            ("group_control_gl",),
        ),
        # A fact of one entity said to be another's.
        ("UPDATE placed SET component = -1 WHERE split = 'gl'", ("eval_gl", "near_eval_gl")),
    ],
)
def test_planted_leaks_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sql: str, found: tuple[str, ...]
) -> None:
    right = knowledge.divide_entities

    def wrong(store: Store, *rest: Any) -> None:
        right(store, *rest)
        store.db.execute(sql)
        store.db.execute("INSERT INTO components VALUES (-1, 'x', '', 1, 0)")

    monkeypatch.setattr(knowledge, "divide_entities", wrong)
    pairs = [asked(n, k) for n in range(30) for k in (0, 1)]
    facts = [fact(n, positives=pairs[2 * n]["positives"]) for n in range(30)]
    with pytest.raises(DataError, match="shares texts with training") as caught:
        prepare(recipe(tmp_path, {"fact": facts, "pair": pairs}), 0)
    counts = json.loads(re.findall(r"\{.*\}", str(caught.value))[0].replace("'", '"'))
    assert all(counts[name] for name in found), counts
    assert not (tmp_path / "data").exists()


def test_negatives_of_the_other_side_go(tmp_path: Path) -> None:
    pairs = [
        asked(
            n,
            negatives=[
                asked((n + 1) % 40)["positives"][0],
                fact(n - 1)["positives"][0],
                words(f"own{n}", 9),
            ],
        )
        for n in range(40)
    ]
    data = recipe(tmp_path, {"fact": [fact(n) for n in range(-1, 40)], "pair": pairs})
    made = prepare(data, 0)
    splits = read(data)
    texts = {n: {t for r in rs for t in r.texts()} for n, rs in splits.items()}
    assert not texts["control"] & (texts["gl"] | texts["cl"])
    assert not texts["eval"] & texts["cl"]
    assert made["dropped_texts"]["negative_is_in_other_split"]["count"] > 0
    assert all(words(f"own{r.id[1:].split('-')[0]}", 9) in r.negatives for r in splits["control"])


def test_the_random_protocol_keeps_its_fingerprint(tmp_path: Path) -> None:
    """A folder from before there were two is reused: nothing new is in what it was made from."""
    from lbr_ds.corpora.prepare import _settings

    plain = DataConfig.model_validate({"folder": tmp_path, "sources": [{"path": "x"}]})
    settings = _settings(plain)
    assert not {"protocol"} & settings.keys()
    assert settings["splits"] == {"gl": 0.6, "cl": 0.25, "eval": 0.15}
    assert "role" not in settings["sources"][0]
    known = plain.model_dump() | {"protocol": "knowledge", "splits": {}}
    known["sources"] = [{"path": "x", "role": "both"}]
    assert _settings(DataConfig.model_validate(known))["splits"]["control"] == 0.2


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.splits={gl: 0.5, control: 0.1}"], "splits.control=0.1 needs protocol=knowledge"),
        (["data.splits.gl=0"], "splits.gl=0 leaves no records for stage 1"),
        (["data.sources=[{path: x, role: fact}]"], "role fact needs protocol=knowledge"),
        (["data.protocol=knowledge"], "is set automatically with protocol=knowledge"),
        (["data.protocol=knowledge", "data.splits={control: 0}"], "needs a control set"),
        (["data.protocol=knowledge", "data.splits={}"], "all sources have role pair"),
        (["data.protocol=knowledge", "data.splits={cl: 9}"], "mixes shares and counts"),
        (["data.protocol=known"], "Input should be 'random' or 'knowledge'"),
    ],
)
def test_what_makes_no_sense_is_one_line(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load("demo", overrides)
    assert "\n" not in str(caught.value)


def test_sources_without_a_common_entity(tmp_path: Path) -> None:
    pairs = [asked(n, group="") for n in range(9)]
    with pytest.raises(DataError, match=r"no pair is left whose entity has a fact; name the col"):
        prepare(recipe(tmp_path, {"fact": [fact(n) for n in range(9)], "pair": pairs}), 0)


def test_mining_leaves_the_control_out(tmp_path: Path) -> None:
    """Passages of gl that control has as an answer are no negatives, and the split stays."""
    from lbr_ds.mining.mine import mine

    sources = {"fact": [fact(n) for n in range(40)], "pair": [asked(n) for n in range(40)]}
    data = recipe(tmp_path, sources)
    prepare(data, 0)
    run = load(tiny_recipe(tmp_path / "tiny", prepared=False))
    before = read(data)
    run = run.model_copy(update={"data": data})
    mine(run)
    after = read(data)
    assert after["control"] == before["control"]
    held_out = {t for name in ("eval", "control") for r in after[name] for t in r.texts()}
    mined = {t for r in after["cl"] for t in r.negatives}
    assert mined
    assert not mined & held_out
