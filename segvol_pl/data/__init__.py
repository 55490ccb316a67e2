"""From shards to batches, at every step: the exact elastic stream, its stores, and the samples drawn from volumes."""
