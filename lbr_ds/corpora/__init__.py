"""Turn raw corpora into cleaned, grouped and divided records, proved free of leaks, in shards.

    from lbr_ds.corpora.prepare import prepare
    audit = prepare(config.data, config.seed)

`formats/` reads, `curate/` decides what stays and where it goes. No module here imports torch.
"""
