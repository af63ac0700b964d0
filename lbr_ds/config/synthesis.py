"""The section `synthesis`: how `lbr-ds synthesize` writes queries for plain passages."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from lbr_ds.config.section import MAX_COUNT, Address, NameOrPath, Section

PROMPT = (
    "Write {count} different search queries that the passage below answers. {domain}\n"
    "Each query must make sense to someone who has not seen the passage: name what it is about, "
    'and do not say "this passage" or "the text". Use your own words. Write one query a line, '
    "without numbers and without anything else.\n\n"
    "Passage:\n{passage}"
)


class ExampleConfig(Section):
    """One example for the language model: a passage and good queries for it."""

    passage: str = Field(min_length=1, description="The passage of an example.")
    queries: list[str] = Field(min_length=1, description="Good queries for that passage.")


class SynthesisConfig(Section):
    """How `lbr-ds synthesize` writes queries. The rules are in `synthesis/rules.py`."""

    url: Address = Field(
        default="",
        description="URL of an OpenAI-compatible server (vLLM, llama.cpp, Ollama, a provider), for "
        "example http://localhost:8000/v1. Empty: the model runs in this process.",
    )
    model: NameOrPath = Field(
        default="",
        description="With url: the name of the model at the server; empty if it serves only one. "
        "Without url: a folder, hub name or wheel: of a causal LM; empty: model.backbone with all "
        "of its layers.",
    )
    api_key_variable: str = Field(
        default="OPENAI_API_KEY",
        description="Environment variable that holds the API key of the server, if it needs one.",
    )
    prompt: str = Field(
        default=PROMPT,
        description="The prompt. {passage} is replaced by the passage, {count} by "
        "synthesis.queries, and {domain} by synthesis.domain.",
    )
    domain: str = Field(
        default="",
        description='Who asks, and how, for example "Patients ask about diseases in everyday '
        'words.". It is put into the prompt.',
    )
    examples: list[ExampleConfig] = Field(
        default_factory=list,
        description="Passages with good queries, which are shown to the model before each passage.",
    )
    queries: int = Field(
        default=3,
        ge=1,
        le=100,
        json_schema_extra={"unit": "queries per passage"},
        description="Number of queries that the prompt asks for.",
    )
    passages: tuple[Literal["cl", "gl"], ...] = Field(
        default=("cl",),
        min_length=1,
        description="Splits whose plain passages get queries. The pairs always go into cl.",
    )
    max_passages: int | None = Field(
        default=None,
        ge=1,
        le=MAX_COUNT,
        json_schema_extra={"unit": "passages"},
        description="Write queries for at most this many passages, drawn by seed. null: all.",
    )
    passage_chars: int = Field(
        default=4000,
        ge=1,
        le=MAX_COUNT,
        json_schema_extra={"unit": "characters"},
        description="Maximum length of a passage in the prompt. Longer passages are truncated.",
    )
    temperature: float = Field(
        default=0.7, ge=0, le=2, description="Sampling temperature. 0: greedy decoding."
    )
    max_tokens: int = Field(
        default=256,
        ge=1,
        le=MAX_COUNT,
        json_schema_extra={"unit": "tokens"},
        description="Maximum length of an answer, which holds all queries of a passage.",
    )
    concurrency: int = Field(
        default=16,
        ge=1,
        le=1024,
        json_schema_extra={"unit": "requests"},
        description="With url: number of simultaneous requests. Without url: batch size in "
        "passages.",
    )
    requests_per_minute: float | None = Field(
        default=None,
        gt=0,
        le=1e9,
        json_schema_extra={"unit": "requests per minute"},
        description="With url: maximum number of requests per minute. null: no limit.",
    )
    retries: int = Field(
        default=6,
        ge=0,
        le=100,
        json_schema_extra={"unit": "tries"},
        description="With url: how often a request is repeated after a lost connection, HTTP 429 "
        "or a server error. Pauses grow, or are as long as the server says.",
    )
    timeout: float = Field(
        default=120,
        gt=0,
        le=86_400,
        json_schema_extra={"unit": "seconds"},
        description="With url: time limit of one request.",
    )
    keep_rank: int | None = Field(
        default=10,
        ge=1,
        le=MAX_COUNT,
        description="Keep a query only if its own passage is among this many best-ranked passages "
        "for it. Ranked are the passages of cl and gl without the others of its group. null: keep "
        "all.",
    )
    ranker: NameOrPath = Field(
        default="bm25",
        description="The ranker for keep_rank: bm25, or a run, checkpoint or export of lbr-ds, or "
        "any model that sentence-transformers loads.",
    )

    @field_validator("prompt")
    @classmethod
    def _has_a_passage(cls, value: str) -> str:
        if "{passage}" not in value:
            raise ValueError(
                "the prompt has no {passage}, which is replaced by the passage; add it"
            )
        return value

    @model_validator(mode="after")
    def _no_key_in_the_url(self) -> SynthesisConfig:
        if self.url and not self.url.startswith(("http://", "https://")):
            raise ValueError(f"url={self.url}: give http:// or https://, with the path /v1")
        return self
