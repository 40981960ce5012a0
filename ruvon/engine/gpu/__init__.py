"""Steps on a GPU: captured at start, and from then on replayed.

A plan (`runner`) becomes words in a staging buffer of the host's memory (`inputs`), by what the
device already holds of each sequence (`persistent_batch`, `sampling_state`); a captured step
(`graphs`) loads them and stores its results there, which are read back when somebody asks
(`in_flight`). What no captured step does is launched beside it (`typical`, `scoring`).
"""
