"""CT files into tar shards, once: finding cases, preparing them, pseudo-label regions, joining shards."""
