"""KVzip (chapter 8): query-agnostic eviction of a context's key-value pairs. The story is in `cache.py`."""
