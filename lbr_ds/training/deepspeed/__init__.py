"""The only door for DeepSpeed: the engine, universal checkpoints, leaf layers, sharded loading."""
