"""Anthropic's Messages API: requests become conversations, deltas become content blocks."""
