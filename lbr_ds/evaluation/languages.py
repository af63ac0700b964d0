"""Find the languages of texts as mteb names them, `zho-Hans`: ISO 639-3 and ISO 15924."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

from lbr_ds.corpora.curate.language import ISO_639_3, SCRIPTS, identify, scripts

_TEXTS, _CHARS = 1000, 500  # examined: texts, and characters of each
_SHARE = 0.1  # of the texts (of a script's pieces) that a language must have to be named
_ENOUGH = 0.25  # texts with kana for one in Han characters alone, where all are Japanese
_PIECE = 300  # letters of one script that are identified at once
_CODES = {
    "LATIN": "Latn",
    "CYRILLIC": "Cyrl",
    "GREEK": "Grek",
    "ARABIC": "Arab",
    "HEBREW": "Hebr",
    "DEVANAGARI": "Deva",
    "BENGALI": "Beng",
    "GUJARATI": "Gujr",
    "GURMUKHI": "Guru",
    "ORIYA": "Orya",
    "TAMIL": "Taml",
    "TELUGU": "Telu",
    "KANNADA": "Knda",
    "MALAYALAM": "Mlym",
    "SINHALA": "Sinh",
    "THAI": "Thai",
    "LAO": "Laoo",
    "TIBETAN": "Tibt",
    "MYANMAR": "Mymr",
    "KHMER": "Khmr",
    "GEORGIAN": "Geor",
    "ARMENIAN": "Armn",
    "ETHIOPIC": "Ethi",
    "HANGUL": "Hang",
    "HIRAGANA": "Jpan",
    "CJK": "Hans",
    "MONGOLIAN": "Mong",
}
# Where a script has a main language: that language, unless the recipe names another.
_MAIN = {"GREEK": "el", "HEBREW": "he", "HIRAGANA": "ja", "HANGUL": "ko", "CJK": "zh"}


def languages_of(texts: Iterable[str], wanted: Sequence[str] = ()) -> list[str]:
    """Return the languages of a tenth or more of the texts, most frequent first.

    wanted: ISO 639-1 codes of `data.languages`; where only one of them uses a script, texts in it
    are of that language. Otherwise the script decides where one language uses it, py3langid where
    several do. "und" (undetermined) with the script's code where neither can tell.
    """
    sample = list(texts)
    sample = [text[:_CHARS] for text in sample[:: -(-len(sample) // _TEXTS) or 1]]
    by_script: dict[str, list[str]] = defaultdict(list)
    for text in sample:
        if script := _script(text):
            by_script[script].append(text)
    _give_han_away(by_script)
    most = sum(map(len, by_script.values()))
    found: list[str] = []
    for script, own in sorted(by_script.items(), key=lambda item: -len(item[1])):
        if script in _CODES and len(own) >= _SHARE * most:
            code = _hans_or_hant(own) if script == "CJK" else _CODES[script]
            found += [f"{_long(language)}-{code}" for language in _languages(script, own, wanted)]
    return found or ["und-Zyyy"]


def _script(text: str) -> str:
    """Return the script of most letters; that of Japanese where a tenth of its letters are kana."""
    counts = scripts(text)
    counts["HIRAGANA"] += counts.pop("KATAKANA", 0)
    if counts["HIRAGANA"] >= _SHARE * (counts["HIRAGANA"] + counts["CJK"]):
        counts["HIRAGANA"] += counts.pop("CJK", 0)
    script, letters = counts.most_common(1)[0]
    return script if letters else ""


def _give_han_away(by_script: dict[str, list[str]]) -> None:
    """Texts of Han characters alone are Japanese or Korean where enough of the others are."""
    for script in ("HIRAGANA", "HANGUL"):
        if len(by_script.get(script, ())) > _ENOUGH * len(by_script.get("CJK", ())):
            by_script[script] += by_script.pop("CJK", [])


def _languages(script: str, texts: list[str], wanted: Sequence[str]) -> list[str]:
    """Return the languages of texts of one script, most frequent first; [""]: unknown."""
    users = [code for code in wanted if script in SCRIPTS.get(code, ("LATIN",))]
    if len(users) == 1:
        return users
    every = [code for code, own in SCRIPTS.items() if script in own]
    if script in _MAIN or len(every) == 1:
        return [_MAIN.get(script) or every[0]]
    votes = Counter(map(identify, _pieces(texts)))
    total = votes.total()
    named = [code for code, count in votes.most_common() if code and count >= _SHARE * total]
    return named if sum(votes[code] for code in named) > total / 2 else [""]


def _pieces(texts: list[str]) -> Iterable[str]:
    """Neighbouring texts together, so that short ones can be identified."""
    piece = ""
    for text in texts:
        piece += f"{text}\n"
        if len(piece) >= _PIECE:
            yield piece
            piece = ""
    if piece:
        yield piece


def _long(language: str) -> str:
    """ISO 639-3."""
    return ISO_639_3.get(language, language) or "und"


def _hans_or_hant(texts: list[str]) -> str:
    """Whether more characters are in the standard of simplified characters or of traditional."""
    joined = "".join(texts)
    simple, full = (
        len(joined.encode(standard, errors="ignore")) for standard in ("gb2312", "big5")
    )
    return "Hans" if simple >= full else "Hant"
