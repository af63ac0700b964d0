"""Turn raw corpora into shards of cleaned, grouped and split records, verified to be free of leaks.

    from lbr_ds.corpora.prepare import prepare
    audit = prepare(config.data, config.seed)

`formats/` reads files; `curate/` decides which records are kept, and in which split. No module here
imports torch.
"""
