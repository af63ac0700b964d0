"""Check the nodes of a cluster for a run, and measure the cluster (see README.md)."""
