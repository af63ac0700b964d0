"""A backbone name or folder -> an embedder. Knows no rank and no DeepSpeed.

bottleneck.py prepares the backbone once (K tokens, their rows, the tokenizer that appends them);
attention.py is IB attention; embedder.py is the one forward that training calls; head.py computes
the losses of stage 1 inside it; lora.py adds adapters; packed_encoder.py encodes texts outside of
training. README.md lists all files.
"""
