"""Step after step. One loop for both stages; a stage is a value.

loop.py is the loop; stages.py says what a stage collates and how it learns; feed.py brings batches;
engine.py is the only door for deepspeed, meter.py for tensorboard; checkpoint.py saves and resumes;
launch.py starts the ranks of one machine; preempt.py turns signals into a flag.
"""
