"""How many replicas a load wants, as Ray Serve counts it: a number of requests for each of them."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from dataclasses import dataclass

import structlog

from ruvon.config import RouterConfig
from ruvon.router.fleet import Fleet
from ruvon.router.supervisor import Site, Slot, Supervisor

log = structlog.get_logger(__name__)


@dataclass(slots=True)
class Scale:
    """Follows the load. What it wants changes when that has been so for a while: a burst is over
    before another replica is there, and a pause is no reason to lose a cache."""

    config: RouterConfig
    _over_since: float | None = None
    _under_since: float | None = None

    def wanted(self, now: float, load: int, count: int) -> int:
        """How many there should be, where ``count`` have ``load`` requests that run or wait."""
        config = self.config
        least = config.data_parallel_size
        most = max(config.max_replicas or least, least)
        fitting = min(max(math.ceil(load / config.target_ongoing_requests), least), most)
        self._over_since = self._since(self._over_since, now, fitting > count)
        self._under_since = self._since(self._under_since, now, fitting < count)
        if self._over_since is not None and now - self._over_since >= config.upscale_delay:
            return fitting
        if self._under_since is not None and now - self._under_since >= config.downscale_delay:
            return count - 1  # one at a time: what is left has to bear it
        return count

    @staticmethod
    def _since(before: float | None, now: float, holds: bool) -> float | None:
        if not holds:
            return None
        return now if before is None else before


async def follow_load(supervisor: Supervisor, fleet: Fleet, make_site: Callable[[], Site]) -> None:
    """Start replicas and let some leave, as the load wants it."""
    scale, loop = Scale(fleet.config), asyncio.get_running_loop()
    async with asyncio.TaskGroup() as leaving:
        while not fleet.draining:
            await asyncio.sleep(fleet.config.poll_interval)
            slots = [slot for slot in supervisor.slots if not slot.leaving]
            load = sum(slot.replica.load for slot in slots)
            wanted = scale.wanted(loop.time(), load, len(slots))
            if wanted != len(slots):
                log.info("scaling", load=load, replicas=len(slots), wanted=wanted)
            for _ in range(len(slots), wanted):
                supervisor.add("", make_site())
            for slot in sorted(slots, key=by_loss)[: len(slots) - wanted]:
                leaving.create_task(supervisor.retire(slot))


def by_loss(slot: Slot) -> tuple[bool, int, int]:
    """What leaves with a replica, the least first: requests, and prompts that it has cached."""
    return slot.replica.open, slot.replica.load, len(slot.replica.prefixes)
