"""Plan a run on a cluster, check its nodes, and measure the cluster (see README.md)."""
