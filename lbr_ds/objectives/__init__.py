"""Tensors -> (loss, stats). One paper idea per file.

A loss here is this rank's share of the step's loss: added up over all ranks it is the loss of the
whole step, whatever the packing, the micro-batches and the number of ranks.
"""
