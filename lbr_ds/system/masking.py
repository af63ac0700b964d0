"""Hide what looks like a secret in a text.

Log lines, error lines, and the recipe, job script and command stored in a run folder go through
`mask_secrets`. Scanners of source code (detect-secrets) report where a secret may be, by line and
kind of file; here every log line is needed without it. The patterns are the forms that the issuers
of tokens document, and the names that job scripts use.
"""

from __future__ import annotations

import logging
import re

HIDDEN = "***"

# user:password@ and user@ of a URL. A password may hold any character but a blank or a double
# quote; digits behind the colon are a port.
_USER = re.compile(
    r"\b([a-z][a-z0-9+.-]*://)"
    r"(?:[^\s/@:\"<>?#]*:(?!\d+(?:[/?#\s\"']|$))(?:(?!://)[^\s\"<>])*@|[^\s/@:\"'<>]+@)",
    re.I,
)
_QUERY = re.compile(r"\b([a-z][a-z0-9+.-]*://[^\s?'\"#]*)\?[^\s'\"#]*", re.I)

_QUOTED = r"\"(?:\\.|[^\"\\])*\"|'(?:\\.|[^'\\])*'"
# One value: a quoted one with its blanks, or the rest of the word.
_VALUE = rf"(?:{_QUOTED}(?=[\s,;:)}}\]]|$)|(?:{_QUOTED}|\\.|[^\s\\])+)"

# Names whose value is a secret, by their last words: api_key, HF_TOKEN, db-password.
_WORDS = (
    r"secrets?|\w*passw(?:or)?d|passphrase|passcode|credentials?"
    r"|(?:api|access|secret|private|auth|account|storage|encryption|signing|service|master|deploy"
    r"|wandb|license|subscription)[_-]?key(?:[_-]?id)?"
    r"|(?:api|auth|access|refresh|id|session|bearer|security|personal|csrf|hub|hf|github|gh|gitlab"
    r"|wandb|slack|bot|deploy|job|registry|oauth|jwt|sas|secret)[_-]?token"
    r"|client[_-]?secret|\w+[_-](?:pass|pwd)"
)
# What is no secret though it follows such a name: an answer, a reference to where the secret is.
_PLAIN = r"(?![\"']?(?:no|none|null|true|false|yes|on|off|\*{3})[\"']?(?:[\s,;)}\]]|$)|\$[\w{(])"
_NAMED = re.compile(
    rf"((?<![A-Za-z])(?:\w*[_-])?(?:{_WORDS})\d*[\"']?"
    rf"(?>\s*(?:=>|[:=]=?)\s*)){_PLAIN}{_VALUE}",
    re.I,
)
# GITHUB_PAT=..., WANDB_KEY=..., "MY_TOKEN": "...": how an environment names them.
_ENVIRONMENT = re.compile(
    r"(\b[A-Z][A-Z0-9_]*(?:TOKEN|_?PAT|_KEY(?:_ID)?|_?PASS|_PWD|_AUTH|_CREDENTIALS?|_SECRET)\d*"
    rf"[\"']?(?>\s*[:=]\s*)){_PLAIN}{_VALUE}"
)
# token=..., "token": "..." alone, if the value is long enough to be one.
_TOKEN = re.compile(
    rf"((?<![\w.-])token[\"']?\s*(?:=|:(?=\s*[\"'])|:(?=\s*\S*\d))\s*)(?=\S{{8}}){_PLAIN}{_VALUE}",
    re.I,
)
# --password x, --hf-token x; -u user:password of curl; sshpass -p x.
_OPTION = re.compile(rf"(--?(?:[\w-]+[_-])?(?:{_WORDS}|token|pat|pass|pwd)\s+)(?!-){_VALUE}", re.I)
_LOGIN = re.compile(r"((?:\s-u|\s--user)[\s=]+[\"']?[^\s:\"']+:)[^\s\"']+")
_SSHPASS = re.compile(rf"(\bsshpass\s+-p\s*|\blogin\s+\S+\s+password\s+){_VALUE}")  # also .netrc
_HEADER = re.compile(
    r"((?:proxy-)?authorization[\"']?\s*[:=]\s*[\"']?)(?:(?:bearer|basic|token|digest)\s+)?[^\s\"',]+",
    re.I,
)
_COOKIE = re.compile(r"(\b(?:set-)?cookie[\"']?\s*:\s*)[^\r\n\"']+", re.I)

_BLOCK = re.compile(
    r"-----BEGIN ([A-Z0-9 ]*PRIVATE KEY(?: BLOCK)?)-----(?!\*{3}).*?(?:-----END \1-----|\Z)", re.S
)
# Tokens that can be recognised by their form.
_FORMS = re.compile(
    r"(?<![A-Za-z0-9_-])(?:"
    r"hf_[A-Za-z0-9]{16,}|api_org_[A-Za-z0-9]{16,}"  # Hugging Face
    r"|gh[a-z]_[A-Za-z0-9]{20,}|github_pat_\w{20,}"  # GitHub
    r"|gl[a-z]{2,5}-[\w-]{20,}"  # GitLab
    r"|sk-(?=[\w-]*\d)[\w-]{16,}|[srp]k_(?:live|test)_[A-Za-z0-9]{10,}"  # OpenAI and others; Stripe
    r"|gsk_\w{20,}|xai-\w{20,}|nvapi-[\w-]{20,}|r8_\w{20,}|pplx-\w{20,}"
    r"|(?:AKIA|ASIA|AROA|AIDA|AGPA|ANPA)[A-Z0-9]{16}(?![A-Z0-9])"  # AWS
    r"|AIza[\w-]{30,}|ya29\.[\w-]{20,}"  # Google
    r"|xox[a-z]-[\w-]{10,}|xapp-[\w-]{10,}"  # Slack
    r"|npm_[A-Za-z0-9]{30,}|pypi-[\w-]{30,}|dckr_pat_[\w-]{20,}|dop_v1_[a-f0-9]{30,}"
    r"|SG\.[\w-]{16,}\.[\w-]{16,}"
    r"|eyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*"  # a JSON Web Token
    r"|AGE-SECRET-KEY-1[A-Z0-9]{20,}"
    r")"
)
_BEARER = re.compile(r"\b((?:Bearer|Basic)\s+)(?=[\w.~+/=-]*[\d=])[\w.~+/=-]{12,}")


def strip_user(url: str) -> str:
    """Return a URL without the user and password before its host."""
    return _USER.sub(r"\1", url)


def mask_secrets(text: str) -> str:
    """Return a text with *** for what looks like a secret.

    Hidden are users and passwords of URLs and their queries, values whose name says that they are
    secret (in the forms of shells, YAML, JSON, Python and HTTP), tokens of known forms and private
    keys. `mask_secrets` of a masked text changes nothing.
    """
    text = _BLOCK.sub(rf"-----BEGIN \1-----{HIDDEN}", text)
    text = _QUERY.sub(r"\1", strip_user(text))
    for pattern in (
        _HEADER,
        _COOKIE,
        _OPTION,
        _LOGIN,
        _SSHPASS,
        _NAMED,
        _ENVIRONMENT,
        _TOKEN,
        _BEARER,
    ):
        text = pattern.sub(rf"\g<1>{HIDDEN}", text)
    return _FORMS.sub(HIDDEN, text)


def mask_record(record: logging.LogRecord) -> bool:
    """Hide secrets in a log record. A filter for log handlers."""
    record.msg, record.args = mask_secrets(record.getMessage()), ()
    return True
