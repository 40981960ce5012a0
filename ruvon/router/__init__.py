"""Many replicas behind one address: which of them answers, and what carries the bytes."""
