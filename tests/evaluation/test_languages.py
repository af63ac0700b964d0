"""The languages of texts, what mteb is given of them, and BM25's words by language."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import mteb
import pytest

from lbr_ds.corpora.curate import language as identification
from lbr_ds.evaluation import evaluate
from lbr_ds.evaluation.bm25 import word_options
from lbr_ds.evaluation.judgements import Judgements, read_held_out
from lbr_ds.evaluation.languages import languages_of
from lbr_ds.evaluation.library_logs import silence_libraries
from lbr_ds.evaluation.models import load_model
from lbr_ds.evaluation.scoring import score_task
from lbr_ds.evaluation.tasks import HeldOutTask, held_out_tasks
from lbr_ds.records import Record
from tests.corpora.test_segmentation import CASES, questions
from tests.tiny import records as english_records

ILLNESSES = "\u092c\u0940\u092e\u093e\u0930\u093f\u092f\u093e\u0901"  # Hindi
KIDNEY = "\u0627\u0644\u0643\u0644\u064a\u0629"  # Arabic
CODES = {
    "en": "eng-Latn",
    "zh": "zho-Hans",
    "ja": "jpn-Jpan",
    "ko": "kor-Hang",
    "th": "tha-Thai",
    "ar": "ara-Arab",
    "ru": "rus-Cyrl",
}


@pytest.mark.parametrize("language", CASES)
def test_languages_of_questions(language: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert languages_of(questions(language)) == [CODES[language]]
    assert languages_of(CASES[language]["diseases"], [language]) == [CODES[language]]
    # Without py3langid the script is known, and the language where the script has a main one.
    identification._identifier.cache_clear()
    monkeypatch.setitem(sys.modules, "py3langid.langid", None)
    unknown = {"en": "und-Latn", "ar": "und-Arab", "ru": "und-Cyrl"}
    assert languages_of(questions(language)) == [unknown.get(language, CODES[language])]


def test_languages_of_mixed_and_empty_texts() -> None:
    both = [*questions("en"), *questions("zh")[:100]]
    assert languages_of(both) == ["eng-Latn", "zho-Hans"]
    assert languages_of([*questions("en"), questions("zh")[0]]) == ["eng-Latn"]
    assert languages_of(["\u9ad8\u8840\u58d3\u61c9\u8a72\u5982\u4f55\u6cbb\u7642"]) == ["zho-Hant"]
    assert languages_of(["ethyl 2-methylpropan-1-ol", "1,2-dichlorobenzene"]) == ["und-Latn"]
    assert languages_of([]) == languages_of(["...", "12"]) == ["und-Zyyy"]


def answers(language: str) -> list[Record]:
    """Each disease is asked about by one question and answered by another about it."""
    case = CASES[language]
    forms = case["questions"]
    return [
        Record(str(i), "s", forms[i % 6].format(disease), [forms[(i + 1) % 6].format(disease)])
        for i, disease in enumerate(case["diseases"])
    ]


@pytest.fixture
def bm25() -> Any:
    return load_model("bm25")


@pytest.mark.parametrize("language", CASES)
def test_bm25_finds_words_of_any_script(language: str, bm25: Any) -> None:
    """By chance 0.2 of the queries have their answer among ten of fifty."""
    task = HeldOutTask(language, Judgements.of(answers(language)))
    with silence_libraries():
        assert score_task(bm25, task, show=False)["recall_at_10"] >= 0.95


def test_bm25_of_english_is_mtebs(bm25: Any) -> None:
    rows = [Record(**row) for row in english_records(60)]
    theirs = mteb.get_model_meta("mteb/baseline-bm25s").load_model()
    for made in (answers("en"), rows):
        tasks = [HeldOutTask("one", Judgements.of(made)) for _ in range(2)]
        assert tasks[0].metadata.eval_langs == ["eng-Latn"]
        with silence_libraries():
            scores = [
                score_task(m, t, show=False) for m, t in zip((bm25, theirs), tasks, strict=True)
            ]
        assert scores[0] == scores[1]
        assert tasks[0].rankings == tasks[1].rankings


@pytest.mark.parametrize(
    ("langs", "text", "expected"),
    [
        (["zho-Hans"], "\u9ad8\u8840\u538b CT", ["\u9ad8\u8840", "\u8840\u538b", "ct"]),
        (["zho-Hans", "eng-Latn"], "kidneys", ["kidneys"]),
        (["hin-Deva"], ILLNESSES, [ILLNESSES[:-4]]),
        (["und-Deva"], ILLNESSES, [ILLNESSES]),
        (["ara-Arab"], KIDNEY, [KIDNEY[:-2]]),
        (["und-Arab"], KIDNEY, [KIDNEY]),
    ],
)
def test_words_of_bm25_by_language(langs: list[str], text: str, expected: list[str]) -> None:
    assert word_options(langs)["tokenizer"](text) == expected


def test_mtebs_own_words_in_scripts_with_blanks() -> None:
    english = {"stopwords": "en", "stemmer_language": "english"}
    assert word_options(["und-Latn"]) == word_options(["eng-Latn", "deu-Latn"]) == english
    assert word_options(["eng-Latn"]) == word_options(["rus-Cyrl"]) == {}


def test_metadata_of_prepared_data(tmp_path: Path) -> None:
    """`data.languages` decides where the texts alone could be of several languages."""
    from lbr_ds.corpora.prepare import prepare
    from tests.corpora.toy import recipe

    raws = [
        {"id": r.id, "source": "s", "query": r.query, "positives": r.positives}
        for r in answers("zh")
    ]
    data = recipe(tmp_path, raws, languages=["zh"])
    made = prepare(data, 0)
    assert made["languages"] == ["zh"]
    assert json.loads((data.folder / "curation.json").read_text())["languages"] == ["zh"]
    task = held_out_tasks(data.folder)[0]
    assert task.metadata.eval_langs == ["zho-Hans"]
    (one,) = held_out_tasks(data.folder, max_queries=1)
    assert one.metadata.eval_langs == ["zho-Hans"]
    scores = evaluate("bm25", data=data.folder)["tasks"]["data-eval"]
    assert scores["recall_at_10"] == 1


def test_the_held_out_split_is_read_with_a_damaged_account(tmp_path: Path) -> None:
    """curation.json only explains the data; without its languages those of the texts count."""
    from lbr_ds.corpora.prepare import prepare
    from tests.corpora.toy import recipe

    data = recipe(tmp_path, english_records(40), languages=["en"])
    prepare(data, 0)
    (whole,) = read_held_out(data.folder)
    assert whole.languages == ("en",)
    for damage in (b'{"languages": ["e', b"[]", b'{"languages": 3}', b"\xff"):
        (data.local_folder / "curation.json").write_bytes(damage)
        assert read_held_out(data.folder) == [replace(whole, languages=())]
