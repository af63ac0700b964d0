"""Which language a text is in, by py3langid (extra `language`): no network, and deterministic.

A text is told to be of another language only when that is nearly certain: of some 10,000 questions
and answers in medical English, 2.4 % look like another language at first sight and none with a
probability of `SURE`.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from lbr_ds.errors import ConfigError, EnvironmentProblem

LETTERS = 20  # a text of fewer is not judged
SURE = 0.9  # probability


def check(languages: tuple[str, ...]) -> None:
    """Raise EnvironmentProblem without py3langid, ConfigError for a code that it does not know."""
    known = _judge().labels if languages else []
    for code in languages:
        if code not in known:
            raise ConfigError(
                f"data.languages: unknown language {code!r}; give ISO 639-1 codes, as en, de, zh"
            )


def other_language(text: str, languages: tuple[str, ...]) -> str:
    """The language of the text when it is surely none of `languages`, else nothing."""
    if sum(map(str.isalpha, text)) < LETTERS:
        return ""
    found, probability = _judge().classify(text)
    return "" if found in languages or probability < SURE else str(found)


@lru_cache(maxsize=1)
def _judge() -> Any:
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError:
        raise EnvironmentProblem(
            "data.languages needs py3langid; pip install 'lbr-ds[language]', or leave it out"
        ) from None
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
