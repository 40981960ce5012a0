"""Tensors in, tensors out. Knows torch, numba and triton; nothing of models, requests or text."""
