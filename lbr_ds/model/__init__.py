"""A backbone name or folder -> an embedder. Knows no rank and no DeepSpeed.

bottleneck.py prepares the backbone once (K tokens, their rows, the tokenizer that appends them);
attention.py is the information bottleneck; embedder.py is the one forward that training calls;
head.py the next-token loss inside it; lora.py lays adapters over it; encoder.py turns texts into
vectors outside of training.
"""
