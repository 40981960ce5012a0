"""How requests are shared out among replicas."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

from ruvon.config.fields import check_fields, setting
from ruvon.errors import ConfigError

OF_RAY = (
    "ray_address", "max_replicas", "target_ongoing_requests", "upscale_delay", "downscale_delay"
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class RouterConfig:
    """How requests are shared out among replicas."""

    data_parallel_size: int = setting(
        1,
        "Replicas, each on cores or on a GPU of its own, behind one address.",
        least=1,
        most=1024,
    )
    data_parallel_backend: Literal["local", "ray"] = setting(
        "local",
        "Where replicas run: on this machine, or where Ray places them (pip install 'ruvon[ray]').",
    )
    ray_address: str | None = setting(
        None,
        "The Ray cluster: host:port, or auto for this machine's. Default: what RAY_ADDRESS names, "
        "or one of this machine alone, for as long as the router runs.",
    )
    max_replicas: int | None = setting(
        None,
        "Replicas that Ray may start as the load grows. Default: as many as data_parallel_size.",
        least=1,
        most=1024,
    )
    target_ongoing_requests: float = setting(
        48.0,
        "Requests, running and waiting, that each replica is to have. More of them want another "
        "replica, fewer one less.",
        least=1,
    )
    upscale_delay: float = setting(
        5.0, "Seconds that a load must want more replicas before there are more.", least=0
    )
    downscale_delay: float = setting(
        120.0, "Seconds that a load must want fewer before one of them leaves.", least=0
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
        if self.data_parallel_backend != "ray":
            usual = {spec.name: spec.default for spec in fields(self)}
            for name in OF_RAY:
                if getattr(self, name) != usual[name]:
                    raise ConfigError(f"{name} needs data_parallel_backend 'ray'")
        if self.max_replicas is not None and self.max_replicas < self.data_parallel_size:
            raise ConfigError(
                f"max_replicas {self.max_replicas} must not be less than data_parallel_size "
                f"{self.data_parallel_size}"
            )
