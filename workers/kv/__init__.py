"""The KV blocks of one worker: layout, storage, pool, prefix cache. No torch."""
