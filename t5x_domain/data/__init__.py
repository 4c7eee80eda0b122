"""From documents to batches: sources, vocabulary, tasks, token cache, packing, loader."""
