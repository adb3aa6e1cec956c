"""Datastore, index and kNN targets: the files of the retrieval side and the stages that make them."""
