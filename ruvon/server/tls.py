"""Encrypted connections: a certificate that can be renewed while the server runs."""

from __future__ import annotations

import ssl

from aiohttp import web

from ruvon.config import ServerConfig
from ruvon.errors import ConfigError


class Certificate:
    """A certificate with its key, as files. ``context`` is what a socket listens with; new
    connections get what was loaded last, those that are open keep theirs."""

    def __init__(self, cert: str, key: str | None) -> None:
        """``key``: its file, None where the certificate's holds it as well. Raises ConfigError."""
        self._files = cert, key
        self.context = self._latest = self._load()
        self.context.sni_callback = self._choose

    def reload(self) -> None:
        """Read the files again. Raises ConfigError, and goes on with what was there."""
        self._latest = self._load()

    def _load(self) -> ssl.SSLContext:
        cert, key = self._files
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        try:
            context.load_cert_chain(cert, key, password=_no_password)
        except (OSError, ValueError) as error:  # what ssl raises is an OSError
            files = cert if key is None else f"{cert}, {key}"
            reason = getattr(error, "strerror", None) or error
            if key is None and not isinstance(error, FileNotFoundError):
                reason = f"{reason}; without tls_key it has to hold the key, too"
            raise ConfigError(f"tls_cert and tls_key: {files}: {reason}") from None
        return context

    def _choose(
        self, connection: ssl.SSLSocket | ssl.SSLObject, name: str | None, context: ssl.SSLContext
    ) -> None:
        """Called when a client says hello, whether it names a host or not."""
        connection.context = self._latest


def _no_password() -> str:
    """OpenSSL would ask at the terminal, with everything waiting."""
    raise ValueError("the key is encrypted; ruvon reads only one that is not")


TLS = web.AppKey[Certificate | None]("tls")


def load_certificate(server: ServerConfig) -> Certificate | None:
    """What connections are encrypted with, if they are."""
    return None if server.tls_cert is None else Certificate(server.tls_cert, server.tls_key)
