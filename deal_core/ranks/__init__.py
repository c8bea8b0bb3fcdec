"""Several processes that train one adapter together, each on its share of every batch.

`parent` starts a launcher, the launcher (PyTorch's elastic agent) starts the ranks, and every rank calls
`deal_core.train.train_adapter`. Rank 0 alone writes files and reports.
"""
