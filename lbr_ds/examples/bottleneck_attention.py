"""Train a transformers causal LM through a bottleneck, in a training loop of your own.

    python bottleneck_attention.py [MODEL]

MODEL is a folder or a name of the Hugging Face hub. Without it a tiny model with random weights
learns the three pairs below by heart, on bytes.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from lbr_ds.batching import Sequence, pack
from lbr_ds.model.attention import packed_forward, use_ib_attention
from lbr_ds.objectives.generative import ib_generative_loss

K = 4  # bottleneck tokens
PAIRS = [
    ("myocardial infarction", "death of heart muscle for lack of blood"),
    ("epistaxis", "bleeding from the nose"),
    ("hypoxia", "too little oxygen in the tissues"),
]


def main(name: str = "") -> None:
    """Take 30 steps and print the losses."""
    torch.manual_seed(0)
    if name:
        model: Any = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        tokens = [f"<b{k}>" for k in range(K)]
        tokenizer.add_tokens(tokens, special_tokens=True)
        model.resize_token_embeddings(len(tokenizer))
        bottleneck, encode = tokenizer.convert_tokens_to_ids(tokens), tokenizer.encode
    else:
        shape: Any = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=256 + K, num_attention_heads=4, **shape))
        bottleneck, encode = list(range(256, 256 + K)), lambda text: list(text.encode())
    # One row of tokens for all pairs, without padding or mask. Y sees B and itself, never X.
    pairs = [(encode(x) + bottleneck, encode(y)) for x, y in PAIRS]
    batch = pack([Sequence(context=xb, num_bottleneck=K, target=y) for xb, y in pairs])
    targets: Any = batch.targets  # of stage 1; batches of stage 2 have none
    use_ib_attention(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5 if name else 3e-3)
    for step in range(30):
        states = packed_forward(model, batch).last_hidden_state[0]
        loss = ib_generative_loss(states[batch.read], model.lm_head.weight, targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step + 1}: loss {loss.item():.4f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
