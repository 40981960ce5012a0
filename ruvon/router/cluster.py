"""Replicas on the machines of a Ray cluster.

Ray says where each one runs, starts its actor again when a machine or a process is lost, and keeps
an account of cores and GPUs. Requests do not go through it.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import structlog

from ruvon.config import EngineConfig, RouterConfig
from ruvon.errors import ConfigError
from ruvon.router.actor import ReplicaActor, Spot
from ruvon.router.places import Place
from ruvon.router.processes import pass_on
from ruvon.router.replica import Replica

log = structlog.get_logger(__name__)

UNPLACED = 10.0  # seconds after which we say that Ray has no room


def import_ray() -> Any:
    """Raises ConfigError where it is not installed."""
    try:
        import ray
    except ImportError as error:
        raise ConfigError(
            f"--data-parallel-backend ray needs Ray: pip install 'ruvon[ray]' ({error})"
        ) from None
    return ray


@contextmanager
def connected(config: RouterConfig) -> Iterator[Any]:
    """Ray, joined to the cluster as long as the block lasts, or to one of this machine alone that
    begins and ends with it. Raises ConfigError."""
    ray = import_ray()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is told to anybody unasked
    address = config.ray_address or os.environ.get("RAY_ADDRESS")
    own = {} if address else {"include_dashboard": False}
    try:
        ray.init(address, log_to_driver=False, configure_logging=False, **own)
    except Exception as error:  # Ray raises that too, of a machine that is too busy
        ray.shutdown()
        raise ConfigError(f"Ray at {address or 'this machine'}: {error}") from error
    try:
        yield ray
    finally:
        ray.shutdown()


@dataclass(frozen=True, slots=True)
class Needs:
    """What Ray is to set aside for a replica."""

    cpus: int
    gpus: int


def needs_of(engine: EngineConfig, gpus_there: float) -> Needs:
    """Raises ConfigError where the settings do not tell. GPUs are taken where the cluster has any,
    which is Ray's to know: this machine may have none."""
    may_take = engine.device == "auto" and engine.kernels != "cpu" and gpus_there
    if engine.device == "cuda" or may_take:
        return Needs(max(engine.threads, 1), engine.num_ranks)
    if not engine.threads:
        raise ConfigError(
            "--data-parallel-backend ray on CPUs needs --threads: how many cores each replica gets"
        )
    return Needs(engine.threads, 0)


class Cluster:
    """The cores of all machines, and who has them: Ray counts cores and does not say which."""

    def __init__(self, ray: Any, engine: EngineConfig, settings: Callable[..., bytes]) -> None:
        self.ray = ray
        self.needs = needs_of(engine, ray.cluster_resources().get("GPU", 0))
        self._engine = replace(engine, device="cuda" if self.needs.gpus else "cpu")
        self._settings = settings
        self._cores: dict[RaySite, tuple[str, tuple[int, ...]]] = {}

    def site(self) -> RaySite:
        """For one more replica."""
        return RaySite(self)

    def tell(self, site: RaySite, spot: Spot) -> bytes:
        """The settings of a replica that runs there."""
        where = {"host": spot.host, "port": spot.port}
        place = Place() if self.needs.gpus else self._take_cores(site, spot)
        return self._settings(self._engine, place=place, **where)

    def free_cores(self, site: RaySite) -> None:
        self._cores.pop(site, None)

    def _take_cores(self, site: RaySite, spot: Spot) -> Place:
        """Cores that no other replica has, or all of the machine's where Ray counts more CPUs than
        it has cores."""
        self.free_cores(site)
        taken = {core for host, own in self._cores.values() if host == spot.host for core in own}
        count = self.needs.cpus
        free = [core for core in spot.cores if core not in taken][:count]
        share = min(count / max(len(spot.cores), 1), 1.0)
        if len(free) < count:
            log.warning("cores_shared", host=spot.host, wanted=count, free=len(free))
            return Place((), count, share)
        self._cores[site] = spot.host, tuple(free)
        return Place(tuple(free), count, share)

    def make_actor(self) -> Any:
        """An actor that Ray places, and starts again wherever it is lost."""
        actor = self.ray.remote(ReplicaActor).options(
            num_cpus=self.needs.cpus, num_gpus=self.needs.gpus, max_restarts=-1,
            max_concurrency=100, scheduling_strategy="SPREAD",
        )  # fmt: skip
        return actor.remote()


class RayProcess:
    """A replica's process, at the other end of an actor."""

    def __init__(self, ray: Any, actor: Any, told: bytes) -> None:
        self._ray, self._actor = ray, actor
        self._ended = asyncio.create_task(self._run(told))

    async def _run(self, told: bytes) -> int:
        with lost_is_lost(self._ray):
            return int(await self._actor.run.remote(told))

    async def wait(self) -> int:
        """Its exit code. Raises ConnectionError when the actor is gone, and it with that."""
        return await asyncio.shield(self._ended)

    def send_signal(self, number: signal.Signals) -> None:
        """On its way there when this returns."""
        self._actor.send_signal.remote(int(number))


class RaySite:
    """Where Ray has put an actor, which has the replica as its child."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._actor: Any = None
        self._reading: asyncio.Task[None] | None = None

    @asynccontextmanager
    async def start(self, replica: Replica) -> AsyncIterator[RayProcess]:
        """Have a place found, and a replica started there."""
        cluster = self._cluster
        spot = await self._placed(replica.name)
        log.info("replica_placed", name=replica.name, host=spot.host, port=spot.port)
        process = RayProcess(cluster.ray, self._actor, cluster.tell(self, spot))
        if self._reading is None or self._reading.done():
            self._reading = asyncio.create_task(self._read_log(replica.name))
        replica.url = f"http://{spot.host}:{spot.port}"
        try:
            yield process
        finally:
            process.send_signal(signal.SIGKILL)
            cluster.free_cores(self)

    async def _placed(self, name: str) -> Spot:
        """The machine that Ray has chosen, once it has. Raises ConnectionError."""
        ray, needs = self._cluster.ray, self._cluster.needs
        with lost_is_lost(ray):
            if self._actor is None:
                self._actor = await asyncio.to_thread(self._cluster.make_actor)
            looking = asyncio.ensure_future(self._actor.look.remote())
            if not (await asyncio.wait([looking], timeout=UNPLACED))[0]:
                log.warning("replica_waits", name=name, for_cpus=needs.cpus, for_gpus=needs.gpus)
            try:
                return Spot(*await looking)
            except ray.exceptions.ActorDiedError:  # somebody has ended it for good
                self._actor = None
                raise

    async def _read_log(self, name: str) -> None:
        with suppress(self._cluster.ray.exceptions.RayError):
            while True:
                for line in await self._actor.log.remote():
                    pass_on(line, name)

    async def close(self) -> None:
        """Give back what Ray has set aside."""
        if self._reading is not None:
            self._reading.cancel()
        actor, self._actor = self._actor, None
        if actor is not None:
            await asyncio.to_thread(self._cluster.ray.kill, actor)


@contextmanager
def lost_is_lost(ray: Any) -> Iterator[None]:
    """An actor that is gone is a connection that has ended, for whoever keeps replicas."""
    try:
        yield
    except ray.exceptions.RayError as error:
        raise ConnectionError(str(error).partition("\n")[0][:200]) from error
