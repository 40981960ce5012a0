"""Does the same request give the same bytes? `ruvon verify` asks the loaded model.

A set of requests, greedy and drawn with seeds, short and long, is answered one at a time. Then it
is answered again in all ways that could make a difference (`cases.CASES`), and every token and
every log-probability must be equal to the last bit. Weights are loaded once.

Kernels that are batch-invariant promise this, and a difference is an error. Of others the same
table says what happened to be equal. `quality` says how far they are from plain torch.
"""
