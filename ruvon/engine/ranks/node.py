"""A machine whose ranks compute for a server on another: it starts them, and passes on what the
server and they have to say to each other."""

from __future__ import annotations

import dataclasses
import selectors
from contextlib import ExitStack
from pathlib import Path

import orjson
import structlog
import torch

from ruvon.config import EngineConfig
from ruvon.engine.ranks.channel import Channel, Frame, Kind
from ruvon.engine.ranks.nodes import join_server, ranks_of_node
from ruvon.engine.ranks.process import RankProcess, send_plan
from ruvon.engine.ranks.ring import NUMBER, PlanRing
from ruvon.engine.ranks.start import check_possible, set_up, spawn
from ruvon.errors import PeerError

log = structlog.get_logger(__name__)


def run_node(config: EngineConfig, device: torch.device, path: Path, threads: int) -> None:
    """Compute for the server until it ends. ``path`` is where this machine has the model.

    Raises ConfigError if the server does not take this machine, PeerError if it is gone without
    a word, or a rank is.
    """
    config = dataclasses.replace(config, device="cuda" if device.type == "cuda" else "cpu")
    check_possible(config)
    connection, meeting = join_server(config)
    log.info("joined", server=config.master_addr, node=config.node_rank)
    with ExitStack() as undo:
        undo.callback(connection.close)
        ring = PlanRing(len(ranks_of_node(config, config.node_rank)))
        undo.callback(ring.close)
        ranks = spawn(config, ranks_of_node(config, config.node_rank), undo)
        set_up(ranks, config, path, threads, meeting, ring)
        Relay(Channel(connection), ranks, ring).run()


class Relay:
    """Between a server and the ranks of this machine."""

    def __init__(self, server: Channel, ranks: list[RankProcess], ring: PlanRing) -> None:
        self._server = server
        self._ranks = {each.rank: each for each in ranks}
        self._ring = ring
        self._ended = False

    def run(self) -> None:
        """Until the server has said that it ends, and all ranks have. Raises PeerError if somebody
        is gone before."""
        with selectors.DefaultSelector() as selector:
            selector.register(self._server, selectors.EVENT_READ, None)
            for each in self._ranks.values():
                selector.register(each.channel, selectors.EVENT_READ, each)
            while len(selector.get_map()) > 1:  # some rank beside the server
                for key, _ in selector.select():
                    more = self._hear_rank(key.data) if key.data else self._hear_server()
                    if not more:
                        selector.unregister(key.fileobj)

    def _hear_server(self) -> bool:
        """Whether it will say more."""
        try:
            frames = self._server.available()
        except EOFError:
            if self._ended:
                return False
            raise PeerError("the server is gone") from None
        for frame in frames:
            self._pass_on(frame)
        return True

    def _pass_on(self, frame: Frame) -> None:
        """To the ranks here, or the one that it is for."""
        ranks = list(self._ranks.values())
        if frame.kind == Kind.WHOLE_PLAN:
            (number,) = NUMBER.unpack_from(frame.payload)
            send_plan(number, frame.payload[NUMBER.size :], self._ring, ranks)
        elif frame.kind == Kind.RESUME:
            self._ranks[frame.rank].send(frame.kind, frame.payload)
        else:
            self._ended |= frame.kind == Kind.END
            for each in ranks:
                each.send(frame.kind, frame.payload)

    def _hear_rank(self, rank: RankProcess) -> bool:
        """Whether it will say more."""
        try:
            frames = rank.channel.available()
        except EOFError:
            if self._ended:
                return False
            fate = rank.fate()
            self._server.send(Kind.GONE, orjson.dumps(fate), rank=rank.rank)
            raise PeerError(f"{rank.name} {fate}") from None
        for frame in frames:
            self._server.send(frame.kind, frame.payload, rank=frame.rank)
        return True
