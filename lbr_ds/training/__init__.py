"""Train a stage: take steps, save checkpoints, write metrics. See README.md in this folder."""
