"""Identify the language of a text by its script, then by py3langid (extra `language`).

py3langid needs no network and is deterministic. A text is considered to be in another language only
if that is nearly certain. A text in a script that no wanted language uses is, however short, unless
it may be a name in Latin letters. The others are classified by py3langid: of 10,000 questions and
answers in medical English, 2.4 % get another language, and none with a probability of `SURE`.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from functools import lru_cache
from typing import Any

from lbr_ds.errors import ConfigError, EnvironmentProblem

LETTERS = 20  # shorter texts are not classified by py3langid
SURE = 0.9  # probability
FOREIGN = 1 / 3  # share of letters of other scripts beyond which a text is of another language
NAME = 2  # words of Latin letters that may be a name in a text of any language
# ISO 639-1 code, ISO 639-3 code, scripts by their names in Unicode; without scripts: Latin.
_TABLE = """
af afr|am amh ETHIOPIC|an arg|ar ara ARABIC|ary ary ARABIC|arz arz ARABIC|as asm BENGALI
az aze LATIN CYRILLIC|ba bak CYRILLIC|be bel CYRILLIC|bg bul CYRILLIC|bn ben BENGALI|br bre
bs bos LATIN CYRILLIC|ca cat|crh crh LATIN CYRILLIC|cs ces|cy cym|da dan|de deu|dz dzo TIBETAN
el ell GREEK|en eng|eo epo|es spa|et est|eu eus|fa fas ARABIC|fi fin|fo fao|fr fra|fy fry|ga gle
gd gla|gl glg|gom gom DEVANAGARI LATIN|grc grc GREEK|gu guj GUJARATI|ha hau|hbo hbo HEBREW
he heb HEBREW|hi hin DEVANAGARI|hr hrv|ht hat|hu hun|hy hye ARMENIAN|id ind|ig ibo|is isl|it ita
ja jpn CJK HIRAGANA KATAKANA|jv jav|ka kat GEORGIAN|kk kaz CYRILLIC LATIN ARABIC|km khm KHMER
kn kan KANNADA|ko kor HANGUL CJK|ku kur LATIN ARABIC CYRILLIC|ky kir CYRILLIC|la lat|lb ltz|lg lug
ln lin|lo lao LAO|lt lit|lv lav|mg mlg|mk mkd CYRILLIC|ml mal MALAYALAM|mn mon CYRILLIC MONGOLIAN
mr mar DEVANAGARI|ms msa LATIN ARABIC|mt mlt|my mya MYANMAR|ne nep DEVANAGARI|nl nld|nn nno|no nor
oc oci|om orm|or ori ORIYA|pa pan GURMUKHI ARABIC|pl pol|ps pus ARABIC|pt por|qu que|ro ron
ru rus CYRILLIC|rw kin
sa san DEVANAGARI|sdh sdh ARABIC|se sme|si sin SINHALA|sk slk|sl slv|sn sna|so som|sq sqi|st sot
sr srp CYRILLIC LATIN|sv swe|sw swa|ta tam TAMIL|te tel TELUGU|tg tgk CYRILLIC|th tha THAI
tk tuk LATIN CYRILLIC|tl tgl|tr tur|tt tat CYRILLIC|ug uig ARABIC CYRILLIC LATIN|uk ukr CYRILLIC
ur urd ARABIC|uz uzb LATIN CYRILLIC|uzs uzs ARABIC|vi vie|vo vol|wa wln|wuu wuu CJK|xh xho|yo yor
yue yue CJK|zh zho CJK BOPOMOFO|zu zul
"""
_ENTRIES = [entry.split() for line in _TABLE.split("\n") for entry in line.split("|") if entry]
SCRIPTS = {code: frozenset(scripts or ["LATIN"]) for code, _, *scripts in _ENTRIES}
ISO_639_3 = {code: long for code, long, *_ in _ENTRIES}


def check(languages: tuple[str, ...]) -> None:
    """Raise EnvironmentProblem without py3langid, ConfigError for an unknown language."""
    known = _identifier().labels if languages else []
    for code in languages:
        if code not in known:
            raise ConfigError(
                f"data.languages: unknown language {code!r}; give ISO 639-1 codes, as en, de, zh"
            )


def other_language(text: str, languages: tuple[str, ...]) -> str:
    """Return the script or language of a text that is surely in none of `languages`, else ""."""
    counts = scripts(text)
    wanted = {script for code in languages for script in SCRIPTS.get(code, ["LATIN"])}
    foreign = Counter({script: n for script, n in counts.items() if script not in wanted})
    # Names and abbreviations are written in Latin letters in any language.
    if len(counts) > 1 or len(text.split()) <= NAME:
        del foreign["LATIN"]
    if foreign.total() > FOREIGN * counts.total():
        return f"script {foreign.most_common(1)[0][0].title().replace('Cjk', 'Han')}"
    if counts.total() < LETTERS:
        return ""
    code, probability = _identifier().classify(text)
    return "" if code in languages or probability < SURE else f"language {code}"


def scripts(text: str) -> Counter[str]:
    """Count the letters of each script, by the names of the Unicode standard.

    The first letter of a Greek word is not counted, because single Greek letters are symbols.
    """
    if text.isascii():
        return +Counter(LATIN=sum(map(str.isalpha, text)))
    counts: Counter[str] = Counter()
    before = ""
    for letter in unicodedata.normalize("NFKC", text):
        script = _script(letter)
        if script and (script != "GREEK" or before == "GREEK"):
            counts[script] += 1
        before = script
    return counts


@lru_cache(maxsize=1 << 14)
def _script(letter: str) -> str:
    """Return the script of a letter; "" for other characters and letters that many scripts use."""
    if not letter.isalpha():
        return ""
    first = re.split("[ -]", unicodedata.name(letter, ""))[0]
    return {"IDEOGRAPHIC": "CJK", "MODIFIER": ""}.get(first, first)


def identify(text: str) -> str:
    """Return the ISO 639 code of a text's language; "" if py3langid is unsure or not installed."""
    try:
        code, probability = _identifier().classify(text)
    except EnvironmentProblem:
        return ""
    return "" if probability < SURE or code == "zxx" else str(code)


@lru_cache(maxsize=1)
def _identifier() -> Any:
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError:
        raise EnvironmentProblem(
            "data.languages needs py3langid; pip install 'lbr-ds[language]', or remove the key"
        ) from None
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
