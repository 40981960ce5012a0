"""Token ids in, token ids out. Knows nothing of text or HTTP; only `loop` says async."""
