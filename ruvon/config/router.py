"""How requests are shared out among replicas."""

from __future__ import annotations

from dataclasses import dataclass

from ruvon.config.fields import check_fields, setting


@dataclass(frozen=True, slots=True)
class RouterConfig:
    """How requests are shared out among replicas."""

    data_parallel_size: int = setting(
        1,
        "Replicas on this machine, each on cores or on a GPU of its own, behind one address.",
        least=1,
        most=1024,
    )
    max_imbalance: int = setting(
        8,
        "Requests by which a replica may be ahead of the least loaded and still get one whose "
        "prompt it has in its cache.",
        least=0,
    )
    prefix_memory: str = setting(
        "64MiB", "Most memory for what one replica is believed to have cached.", unit="size"
    )
    poll_interval: float = setting(
        1.0,
        "Seconds between two looks at a replica. One that misses three is taken out, and what it "
        "has not begun to answer goes to others.",
        least=0.05,
        most=60,
    )

    def __post_init__(self) -> None:
        check_fields(self)
