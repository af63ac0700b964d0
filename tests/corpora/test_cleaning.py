"""Rules for one record: lengths in tokens, the language, and texts that repeat one another."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from lbr_ds.config import ModelConfig
from lbr_ds.corpora.curate.cleaning import Rules, clean, clean_record
from lbr_ds.corpora.curate.language import LETTERS, check, other_language
from lbr_ds.corpora.prepare import prepare
from lbr_ds.errors import ConfigError, EnvironmentProblem
from lbr_ds.records import Record
from tests.corpora.toy import pair, read_all, recipe
from tests.tiny import backbone, records


def test_bounds_in_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By helpers too; counted by transformers as the oracle."""
    raws = records(800)
    model = ModelConfig(backbone=str(backbone(tmp_path / "backbone")))
    tokenizer = AutoTokenizer.from_pretrained(model.backbone)

    def tokens(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    parts = {
        "query": [raw["query"] for raw in raws],
        "answer": [raw["positives"][0] for raw in raws],
    }
    lengths = {part: sorted(tokens(text) for text in texts) for part, texts in parts.items()}
    low, high = lengths["query"][200], lengths["answer"][-200]

    def sound(raw: dict[str, Any]) -> bool:
        return all(low <= tokens(text) <= high for text in (raw["query"], *raw["positives"]))

    monkeypatch.setattr("lbr_ds.corpora.reading._ROWS", 64)
    data = recipe(tmp_path, raws, min_tokens=low, max_tokens=high, near_duplicate=1)
    made = prepare(data, 0, model=model)
    kept = {r.id: r for split in read_all(data.folder).values() for r in split}
    assert set(kept) == {raw["id"] for raw in raws if sound(raw)}
    dropped = made["dropped_records"]
    assert dropped["too_few_tokens"]["count"] > 20
    assert dropped["too_many_tokens"]["count"] > 20
    assert sum(rule["count"] for rule in dropped.values()) == 800 - len(kept)
    name, told, text = dropped["too_many_tokens"]["examples"][0].split(": ")
    assert told == f"{tokens(text)} tokens"
    assert text in (raws[int(name[1:])]["query"], *raws[int(name[1:])]["positives"])
    assert all(low <= tokens(n) <= high for record in kept.values() for n in record.negatives)
    assert made["dropped_texts"]["negative_too_few_tokens"]["count"] > 0


def test_another_tokenizer_makes_the_folder_again(tmp_path: Path) -> None:
    data = recipe(tmp_path, map(pair, range(40)), max_tokens=99)
    model = ModelConfig(backbone=str(backbone(tmp_path / "backbone")))
    prepare(data, 0, model=model)
    assert prepare(data, 0, model=model)["reused"]
    path = tmp_path / "backbone" / "tokenizer.json"
    path.write_text(
        path.read_text().replace('"add_prefix_space": false', '"add_prefix_space": true')
    )
    assert not prepare(data, 0, model=model)["reused"]


def test_bounds_in_tokens_need_a_tokenizer(tmp_path: Path) -> None:
    data = recipe(tmp_path, map(pair, range(40)), max_tokens=99)
    with pytest.raises(ConfigError, match=r"need model\.backbone to count with"):
        prepare(data, 0)
    (tmp_path / "none").mkdir()
    with pytest.raises(ConfigError, match=r"model\.backbone=.*none: .* cannot be loaded"):
        prepare(data, 0, model=ModelConfig(backbone=str(tmp_path / "none")))
    assert not (tmp_path / "data").exists()


GERMAN = "Der Patient klagt seit zwei Tagen \u00fcber Schmerzen in der Brust und \u00fcber Fieber."
FRENCH = "Le patient se plaint de douleurs dans la poitrine depuis deux jours et de la fi\u00e8vre."


def test_languages(tmp_path: Path) -> None:
    assert other_language(GERMAN, ("en",)) == "language de"
    assert other_language(GERMAN, ("en", "de")) == ""
    assert other_language("Herzinfarkt " + "1234 " * LETTERS, ("en",)) == ""  # too short to tell
    raws = [pair(i, positives=[f"The answer to question number {i} is here."]) for i in range(30)]
    raws[3]["positives"] = [GERMAN]
    raws[4]["query"] = FRENCH
    raws[5]["negatives"] = [GERMAN, "A wrong answer to the question."]
    data = recipe(tmp_path, raws, languages=["en"], near_duplicate=1)
    made = prepare(data, 0)
    assert made["dropped_records"] == {
        "other_language": {
            "count": 2,
            "examples": [f"r3: language de: {GERMAN}", f"r4: language fr: {FRENCH}"],
        }
    }
    assert made["dropped_texts"]["negative_other_language"]["count"] == 1
    code = recipe(tmp_path, raws, languages=["en"], near_duplicate=1)
    source = {**code.sources[0].model_dump(), "keep_lines": True}
    made = prepare(recipe(tmp_path, raws, languages=["en"], sources=[source]), 0)
    assert "other_language" not in made["dropped_records"]


CHINESE = [
    "\u5934\u75db",
    "\u75db",
    "\u9ad8\u8840\u538b\u600e\u4e48\u529e\uff1f",
    "\u809d\u764c MRI",
]


@pytest.mark.parametrize(
    ("text", "wanted", "script"),
    [
        *((text, ("en",), "Han") for text in CHINESE),
        *((text, ("zh",), "") for text in CHINESE),
        ("\u9ad8\u8840\u5727\u306e\u75c7\u72b6\u306f\u4f55\u3067\u3059\u304b", ("zh",), "Hiragana"),
        ("\u9ad8\u8840\u5727", ("ja",), ""),
        ("\ub450\ud1b5", ("en", "zh"), "Hangul"),
        ("\u0e1b\u0e27\u0e14\u0e2b\u0e31\u0e27", ("en",), "Thai"),
        ("\u0635\u062f\u0627\u0639", ("en",), "Arabic"),
        ("\u0433\u0440\u0438\u043f\u043f", ("en",), "Cyrillic"),
        ("\u0433\u0440\u0438\u043f\u043f", ("sr",), ""),
        ("\u03c0\u03c5\u03c1\u03b5\u03c4\u03cc\u03c2", ("en",), "Greek"),
        ("\u03b2-\u03b1, 5 \u00b5g", ("en",), ""),  # symbols
        ("What is gout?", ("zh",), "Latin"),
        ("Helicobacter pylori", ("zh",), ""),  # a name
        ("the sign \u75db for pain", ("en",), ""),
    ],
)
def test_scripts_tell_the_language_of_short_texts(
    text: str, wanted: tuple[str, ...], script: str
) -> None:
    assert other_language(text, wanted) == (f"script {script}" if script else "")


def test_short_texts_of_another_script_go(tmp_path: Path) -> None:
    raws = [pair(i) for i in range(30)]
    for number in range(10):
        raws[number] |= {
            "query": f"\u5934\u75db{number}",
            "positives": [f"\u591a\u559d\u6c34{number}"],
        }
    made = prepare(recipe(tmp_path, raws, languages=["en"], near_duplicate=1), 0)
    assert made["dropped_records"]["other_language"]["count"] == 10


def test_languages_that_cannot_be_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = recipe(tmp_path, map(pair, range(40)), languages=["english"])
    with pytest.raises(ConfigError, match=r"data\.languages: unknown language 'english'; give ISO"):
        prepare(data, 0)
    from lbr_ds.corpora.curate import language

    language._identifier.cache_clear()
    monkeypatch.setitem(sys.modules, "py3langid.langid", None)
    with pytest.raises(EnvironmentProblem, match=r"pip install 'lbr-ds\[language\]'"):
        check(("en",))
    check(())
    assert not (tmp_path / "data").exists()


RULES = Rules(1, 1000, 0, None, "", (), False, None)
Case = tuple[list[str], list[str], tuple[list[str], list[str]] | None, list[str]]
CASES: dict[str, Case] = {  # positives, negatives of the query "What is fever?"
    "an answer is the query": (
        ["Heat.", "what is  FEVER"],
        [],
        (["Heat."], []),
        ["positive_is_query"],
    ),
    "the only answer is the query": (["What is fever"], ["Cold."], None, []),
    "both answers are the query": (
        ["What is fever", "what is fever!"],
        [],
        None,
        ["repeated_in_positives"],
    ),
    "a negative is the query": (
        ["Heat."],
        ["WHAT is fever?", "Cold."],
        (["Heat."], ["Cold."]),
        ["negative_is_query"],
    ),
    "a negative is the answer": (
        ["Heat.", "Warmth."],
        ["warmth", "Cold."],
        (["Heat.", "Warmth."], ["Cold."]),
        ["negative_is_a_positive"],
    ),
    "none is another": (["Heat."], ["Cold."], (["Heat."], ["Cold."]), []),
}


@pytest.mark.parametrize(("positives", "negatives", "kept", "rules"), CASES.values(), ids=CASES)
def test_repeated_texts(
    positives: list[str],
    negatives: list[str],
    kept: tuple[list[str], list[str]] | None,
    rules: list[str],
) -> None:
    record = Record("r", "s", "What is fever?", positives, negatives)
    scored = replace(
        record,
        positive_scores=[float(place) for place in range(len(positives))],
        negative_scores=[float(place) for place in range(len(negatives))],
    )
    cleaned = clean_record(record, RULES)
    with_scores = clean_record(scored, RULES)
    assert [rule for rule, _ in cleaned.removed] == rules
    if kept is None:
        assert cleaned.dropped == ("positive_is_query", "r: What is fever?")
        return
    assert cleaned.dropped is None
    assert (cleaned.record.positives, cleaned.record.negatives) == kept
    assert [len(cleaned.keys[name]) for name in ("positives", "negatives")] == [*map(len, kept)]
    found = with_scores.record
    for texts, left, scores in (
        (positives, found.positives, found.positive_scores),
        (negatives, found.negatives, found.negative_scores),
    ):
        assert [clean(texts[int(place)]) for place in scores] == left
        assert scores == sorted(scores)
    assert replace(found, positive_scores=[], negative_scores=[]) == cleaned.record


def test_scores_stay_beside_their_negatives(tmp_path: Path) -> None:
    """A negative that is an answer of its own group is removed after the records are cleaned."""
    raws: list[dict[str, Any]] = [*map(pair, range(30))]
    raws[3] |= {"group": "g", "positive_scores": [4.5]}
    raws[3] |= {"negatives": ["light", "answer 4", "Light.", "sound"]}
    raws[3]["negative_scores"] = [1, 2, 3, 4]
    raws[4]["group"] = "g"
    prepare(recipe(tmp_path, raws), 0)
    kept = {r.id: r for split in read_all(tmp_path / "data").values() for r in split}
    assert (kept["r3"].negatives, kept["r3"].negative_scores) == (["light", "sound"], [1, 4])
    assert kept["r3"].positive_scores == [4.5]


def test_they_are_counted(tmp_path: Path) -> None:
    raws: list[dict[str, Any]] = [*map(pair, range(30))]
    raws[3]["positives"] = ["Question 3!"]
    raws[4]["positives"].append("question 4.")
    raws[5]["negatives"] = ["QUESTION 5", "answer 5?", "sound"]
    made = prepare(recipe(tmp_path, raws), 0)
    assert made["dropped_records"]["positive_is_query"]["count"] == 1
    counts = {rule: entry["count"] for rule, entry in made["dropped_texts"].items()}
    assert counts == {"positive_is_query": 1, "negative_is_query": 1, "negative_is_a_positive": 1}
    kept = {r.id: r for split in read_all(tmp_path / "data").values() for r in split}
    assert kept.keys() == {f"r{n}" for n in range(30)} - {"r3"}
    assert kept["r4"].positives == ["answer 4"]
