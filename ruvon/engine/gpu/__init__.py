"""Steps on a GPU: captured at start, and from then on replayed.

A plan (`runner`) becomes words in a box of the host's memory (`inputs`), by what the device already
knows of each sequence (`seats`, `seatwork`); a captured step (`graphs`) fetches them and leaves its
results there, which are taken down when somebody asks (`flight`).
"""
