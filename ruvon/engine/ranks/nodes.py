"""Ranks on other machines: how the server's machine and the others find and trust each other, and
the connection between them.

Each side proves that it knows the same key, without sending it. What follows travels as it is, like
what gloo and NCCL send between ranks: the network between the machines has to be a private one.
"""

from __future__ import annotations

import dataclasses
import hmac
import secrets
import socket
import time
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from queue import SimpleQueue
from threading import Thread
from typing import Any

import structlog
import torch.distributed as dist

from ruvon.config import EngineConfig
from ruvon.engine.ranks.channel import Channel, Kind
from ruvon.errors import ConfigError
from ruvon.telemetry import Progress

log = structlog.get_logger(__name__)

PORT = 29500
NONCE = 32  # bytes
HANDSHAKE = 5.0  # seconds for a peer to say who it is
PATIENCE = 600.0  # seconds for all machines to come
RETRY = 1.0  # seconds
OWN = ("model", "revision", "threads", "pin_threads", "cpu_isa", "node_rank", "cluster_key")
"""Settings in which machines may differ."""


class NodeLink:
    """The server's end of the connection to another machine. What is sent goes through a thread:
    a network that stands still must not hold up whoever plans."""

    def __init__(self, node: int, ranks: range, connection: socket.socket) -> None:
        self.ranks = ranks
        self.name = f"node {node}"
        self.channel = Channel(connection)
        self._connection = connection
        self._outgoing: SimpleQueue[tuple[Kind, bytes, int] | None] = SimpleQueue()
        self._sender = Thread(target=self._send, name=f"ruvon-node-{node}", daemon=True)
        self._sender.start()

    def send(self, kind: Kind, payload: bytes = b"", *, rank: int = 0) -> None:
        self._outgoing.put((kind, payload, rank))

    def _send(self) -> None:
        with suppress(OSError):  # whoever reads from it finds out
            while (frame := self._outgoing.get()) is not None:
                kind, payload, rank = frame
                self.channel.send(kind, payload, rank=rank)

    def fate(self) -> str:
        return "closed its connection"

    def kill(self) -> None:
        with suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)

    def end(self, patience: float) -> None:
        """Send what is to be sent, and no more."""
        self._outgoing.put(None)
        self._sender.join(patience)

    def close(self) -> None:
        self.channel.close()


def ranks_of_node(config: EngineConfig, node: int) -> range:
    """Which ranks a machine has: as many as each other one, in order."""
    each = config.num_ranks // config.nnodes
    return range(node * each, (node + 1) * each)


def shared_settings(config: EngineConfig) -> dict[str, Any]:
    """Those that must be the same on all machines."""
    fields = dataclasses.asdict(config)
    return {name: value for name, value in fields.items() if name not in OWN}


@dataclass(frozen=True, slots=True)
class Rendezvous:
    """Where ranks of several machines find each other, and the address that this one has there."""

    host: str
    port: int
    address: str
    store: object = None  # to be kept as long as ranks live, where it is this process's


def listen(config: EngineConfig, undo: ExitStack) -> socket.socket:
    """Listen for the other machines. Raises ConfigError where that cannot be."""
    assert config.master_addr is not None
    address = (config.master_addr, config.master_port or PORT)
    try:
        listener = socket.create_server(address, reuse_port=False)
    except OSError as error:
        raise ConfigError(
            f"--master-addr {address[0]} --master-port {address[1]}: {error}"
        ) from None
    undo.callback(listener.close)
    return listener


def open_store(config: EngineConfig) -> Rendezvous:
    """Where ranks find each other, on the address that other machines know."""
    assert config.master_addr is not None
    listener = socket.create_server((config.master_addr, 0))
    port = listener.getsockname()[1]
    torch_stores: Any = dist  # whose stubs do not have them
    store = torch_stores.TCPStore(
        config.master_addr, port, is_master=True, wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )  # fmt: skip
    return Rendezvous(config.master_addr, port, config.master_addr, store)


def accept_nodes(
    config: EngineConfig,
    listener: socket.socket,
    store: tuple[str, int],
    progress: Progress,
    undo: ExitStack,
) -> list[NodeLink]:
    """Wait for all other machines. Raises ConfigError if one has other settings, or does not come
    in time."""
    links: dict[int, NodeLink] = {}
    deadline = time.monotonic() + PATIENCE
    while len(links) < config.nnodes - 1:
        progress("waiting for machines", len(links) / (config.nnodes - 1))
        listener.settimeout(max(deadline - time.monotonic(), 0.01))
        try:
            connection, peer = listener.accept()
        except TimeoutError:
            missing = sorted({*range(1, config.nnodes)} - links.keys())
            raise ConfigError(f"--nnodes {config.nnodes}: node {missing[0]} has not come") from None
        try:
            node = greet_node(connection, config, links, store)
        except (OSError, EOFError, ValueError) as error:
            log.warning("node_refused", peer=peer[0], reason=str(error))
            connection.close()
            continue
        links[node] = link = NodeLink(node, ranks_of_node(config, node), connection)
        undo.callback(link.close)
        undo.callback(link.kill)
        log.info("node_joined", node=node, peer=peer[0])
    return [links[node] for node in sorted(links)]


def greet_node(
    connection: socket.socket,
    config: EngineConfig,
    known: Mapping[int, object],
    store: tuple[str, int],
) -> int:
    """Which machine this is, once it has proved that it is one of ours, and been told where ranks
    meet. Raises ValueError, OSError or EOFError for others, and ConfigError for one of ours that
    cannot take part."""
    connection.settimeout(HANDSHAKE)
    prove(connection, key_of(config), b"server", b"node")
    channel = Channel(connection)
    hello = channel.receive().json
    node, theirs, ours = hello["node"], hello["settings"], shared_settings(config)
    odd = [name for name in ours if theirs.get(name) != ours[name]]
    why = None
    if not 1 <= node < config.nnodes or node in known:
        why = f"--node-rank {node}: that machine is there already, or there is no such"
    elif odd:
        flag = "--" + odd[0].replace("_", "-")
        why = f"{flag} is {theirs.get(odd[0])!r} on node {node} and {ours[odd[0]]!r} on node 0"
    if why is not None:
        channel.send_json(Kind.FATAL, {"type": "ConfigError", "message": why})
        raise ConfigError(why)
    channel.send_json(Kind.WELCOME, {"store": store})
    connection.settimeout(None)
    return int(node)


def join_server(config: EngineConfig) -> tuple[socket.socket, Rendezvous]:
    """Connect to the machine that serves. Raises ConfigError if it is not there in time, does not
    know the key, or does not take this one."""
    assert config.master_addr is not None
    address = (config.master_addr, config.master_port or PORT)
    connection = connect(address)
    connection.settimeout(HANDSHAKE)
    try:
        prove(connection, key_of(config), b"node", b"server")
        channel = Channel(connection)
        hello = {"node": config.node_rank, "settings": shared_settings(config)}
        channel.send_json(Kind.SETUP, hello)
        frame = channel.receive()
    except (OSError, EOFError, ValueError) as error:
        raise ConfigError(f"--master-addr {address[0]}: {error}") from None
    if frame.kind != Kind.WELCOME:
        raise ConfigError(frame.json["message"])
    connection.settimeout(None)
    host, port = frame.json["store"]
    return connection, Rendezvous(host, port, connection.getsockname()[0])


def connect(address: tuple[str, int]) -> socket.socket:
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            return socket.create_connection(address, HANDSHAKE)
        except OSError as error:
            if time.monotonic() > deadline:
                raise ConfigError(f"--master-addr {address[0]}: {error}") from None
            time.sleep(RETRY)


def key_of(config: EngineConfig) -> bytes:
    assert config.cluster_key is not None
    return config.cluster_key.encode()


def prove(connection: socket.socket, key: bytes, me: bytes, peer: bytes) -> None:
    """Show the other side that we know the key, and see that it does: each signs what both have
    drawn. Raises ValueError if it does not."""
    ours = secrets.token_bytes(NONCE)
    connection.sendall(ours)
    theirs = receive(connection, NONCE)

    def sign(who: bytes, first: bytes, second: bytes) -> bytes:
        return hmac.digest(key, who + first + second, "sha256")

    connection.sendall(sign(me, ours, theirs))
    if not hmac.compare_digest(receive(connection, 32), sign(peer, theirs, ours)):
        raise ValueError("the other side has another --cluster-key")


def receive(connection: socket.socket, size: int) -> bytes:
    """So many bytes. Raises EOFError if the other side ends before."""
    data = b""
    while len(data) < size:
        piece = connection.recv(size - len(data))
        if not piece:
            raise EOFError("the connection is closed")
        data += piece
    return data
