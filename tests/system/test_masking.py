"""Secrets are hidden in whatever form they come, and nothing else is."""

from __future__ import annotations

import pytest

from lbr_ds.system.masking import mask_secrets
from lbr_ds.system.urls import public_url

WORD = "open-sesame"
HIDDEN = [
    # URLs
    (f"https://me:{WORD}@host/a?x=1#sha256=ab: no", "https://host/a#sha256=ab: no"),
    (f"s3://key:{WORD}@bucket/a, b", "s3://bucket/a, b"),
    (f"https://me:p@ss{WORD}@host/a", "https://host/a"),
    (f"https://me:p'{WORD}@host/a", "https://host/a"),
    (f"https://me:p/{WORD}@host/a", "https://host/a"),
    (f"'https://me:{WORD}@host/a', 'b@c'", "'https://host/a', 'b@c'"),
    (f"https://a:{WORD}@h1/x,https://b:{WORD}@h2/y", "https://h1/x,https://h2/y"),
    (f"https://{WORD}@github.com/x/y", "https://github.com/x/y"),
    (
        f"pip install --index-url https://u:{WORD}@h/simple x",
        "pip install --index-url https://h/simple x",
    ),
    # shells
    (f"export HF_TOKEN={WORD} # mine", "export HF_TOKEN=*** # mine"),
    (f"export GITHUB_PAT={WORD}", "export GITHUB_PAT=***"),
    (f"WANDB_KEY={WORD} lbr-ds train x", "WANDB_KEY=*** lbr-ds train x"),
    (f"WANDB_API_KEY='{WORD} with blanks' x", "WANDB_API_KEY=*** x"),
    (f'PASSWORD="a {WORD} \\" b" x', "PASSWORD=*** x"),
    (f"PGPASSWORD={WORD}@'/x psql", "PGPASSWORD=*** psql"),
    (f"export DB_PASS={WORD}", "export DB_PASS=***"),
    (f"AWS_SECRET_ACCESS_KEY={WORD}", "AWS_SECRET_ACCESS_KEY=***"),
    (f"lbr-ds push --password {WORD} x", "lbr-ds push --password *** x"),
    (f"x --hf-token={WORD} y", "x --hf-token=*** y"),
    (f"x --api-key {WORD} y", "x --api-key *** y"),
    (f"curl -u me:{WORD} https://h", "curl -u me:*** https://h"),
    (f"sshpass -p {WORD} ssh h", "sshpass -p *** ssh h"),
    (f"machine h login me password {WORD}", "machine h login me password ***"),
    # YAML, JSON, Python, HTTP
    (f"password: {WORD}", "password: ***"),
    (f"aws_secret_access_key = {WORD}", "aws_secret_access_key = ***"),
    (f'{{"password": "{WORD}"}}', '{"password": ***}'),
    (f"{{'api_key': '{WORD}', 'b': 1}}", "{'api_key': ***, 'b': 1}"),
    (f'"HF_TOKEN": "{WORD}"', '"HF_TOKEN": ***'),
    (f"client_secret: '{WORD}'", "client_secret: ***"),
    (f"{{secret => {WORD}", "{secret => ***"),
    (f"token={WORD}", "token=***"),
    (f"Authorization: Basic {WORD}", "Authorization: ***"),
    (f"Authorization: Bearer {WORD}.x-1", "Authorization: ***"),
    (f"X-Api-Key: {WORD}", "X-Api-Key: ***"),
    (f"Cookie: session={WORD}; a=b", "Cookie: ***"),
    # tokens that tell by themselves
    ("use hf_abcdefghijklmnopqrstuvwxyz now", "use *** now"),
    ("use ghp_abcdefghijklmnopqrst0123456789ABCDEF now", "use *** now"),
    ("use github_pat_11ABCDEFG0abcdefghijk_abcdef now", "use *** now"),
    ("use glpat-abcdefghij0123456789 now", "use *** now"),
    ("use sk-proj-abcdefghij0123456789 now", "use *** now"),
    ("use AKIAIOSFODNN7EXAMPLE now", "use *** now"),
    ("use xoxb-123456789012-abcdef now", "use *** now"),
    ("use eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.abc-def now", "use *** now"),
    ("Bearer abcdefgh12345678", "Bearer ***"),
    (
        "-----BEGIN RSA PRIVATE KEY-----\nMIIEabc\n-----END RSA PRIVATE KEY-----\nrest",
        "-----BEGIN RSA PRIVATE KEY-----***\nrest",
    ),
    ("-----BEGIN PRIVATE KEY-----\nMIIEabc", "-----BEGIN PRIVATE KEY-----***"),
]

KEPT = [
    "stage1.micro_batch_tokens=256; tokens: 5",
    "wheel:a==1.0/f#sha256=00 me@host a://b/c",
    "passwd: no",
    "password: none",
    "eos_token='</s>'",
    "eos_token: </s>",
    "pad_token=None",
    "max_tokens=4096",
    "data.max_tokens=512 data.min_tokens=3",
    "--tokens 4096,8192",
    "tokenizer: my-tokenizer-2024",
    "num_tokens=123456789",
    "token_ids=[1234567890]",
    "unknown token: foo",
    "token 5 of 7",
    "special_tokens_map.json",
    "target_tokens: 12345678",
    "http://host:8080/a@b",
    "hf:org/name@main",
    "https://host/a/b#sha256=ab",
    "s3://bucket/a@b/c",
    "PWD=/home/me/x",
    "export HF_HOME=/x",
    "export TOKENIZERS_PARALLELISM=false",
    "sort_key=abc",
    "the basic knowledge of liver",
    "Basic understanding of chemistry",
    "a secret garden",
    "Bearer certificates are rare",
    "secretary: Jane",
    "author: me",
    "authorization is needed",
    "risk-assessment-of-2020-and-more-x",
    "task-0123456789-abcdefghijkl",
    "monkey=1",
    "bypass: 3",
    "HF_TOKEN=$HF_TOKEN",
    "password=${PASSWORD}",
    "#SBATCH --account=abc --partition=gpu",
]


@pytest.mark.parametrize(("text", "wanted"), HIDDEN)
def test_secrets_are_hidden(text: str, wanted: str) -> None:
    assert mask_secrets(text) == wanted
    assert mask_secrets(wanted) == wanted


@pytest.mark.parametrize("text", KEPT)
def test_what_is_no_secret_stays(text: str) -> None:
    assert mask_secrets(text) == text


@pytest.mark.parametrize("password", [WORD, f"p@ss{WORD}", f"p'{WORD}", f"p/{WORD}", f"12{WORD}"])
def test_a_place_is_shown_without_its_password(password: str) -> None:
    assert public_url(f"https://me:{password}@host:81/a/?x=1#y") == "https://host:81/a"
