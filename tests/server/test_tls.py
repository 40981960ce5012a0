"""Encrypted connections, and a certificate that is renewed."""

from __future__ import annotations

import shutil
import ssl
import subprocess
from pathlib import Path

import aiohttp
import pytest
from structlog.testing import capture_logs

from ruvon.config import ServerConfig
from ruvon.errors import ConfigError
from ruvon.server.app import warn_of_open_door
from ruvon.server.tls import Certificate

OPENSSL = shutil.which("openssl")
needs_openssl = pytest.mark.skipif(OPENSSL is None, reason="no openssl to make a certificate")


def make_pair(folder: Path, name: str) -> tuple[str, str]:
    """A certificate for 127.0.0.1 by this name, and its key."""
    cert, key = str(folder / f"{name}.pem"), str(folder / f"{name}.key")
    assert OPENSSL is not None
    subprocess.run(
        [OPENSSL, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes",
         "-days", "2", "-subj", f"/CN={name}", "-addext", "subjectAltName=IP:127.0.0.1",
         "-out", cert, "-keyout", key],
        check=True, capture_output=True,
    )  # fmt: skip
    return cert, key


def trusting(cert: str) -> aiohttp.TCPConnector:
    return aiohttp.TCPConnector(ssl=ssl.create_default_context(cafile=cert), force_close=True)


@needs_openssl
async def test_a_renewed_certificate_is_what_new_clients_see(serve, tmp_path, monkeypatch):
    monkeypatch.setattr("ruvon.server.reload.EVERY", 0.001)
    cert, key = make_pair(tmp_path, "live")
    old, new = tmp_path / "old.pem", make_pair(tmp_path, "renewed")
    shutil.copy(cert, old)
    server = await serve("Hello", server=ServerConfig(port=0, tls_cert=cert, tls_key=key))
    assert server.url.startswith("https://")

    async def works(trusted: str) -> bool:
        async with aiohttp.ClientSession(connector=trusting(trusted)) as session:
            try:
                async with session.get(server.url + "/live") as response:
                    return response.status == 200
            except aiohttp.ClientConnectorCertificateError:
                return False

    assert await works(str(old))
    assert not await works(new[0])
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=False)) as session:
        with capture_logs() as logs:
            shutil.copy(new[0], cert)  # the key is another's, as yet
            await server.until(lambda: any(line["event"] == "reload_failed" for line in logs))
        async with session.get(server.url + "/live") as response:
            assert response.status == 200
        assert await works(str(old))
        shutil.copy(new[1], key)
        while not await works(new[0]):
            pass
        async with session.get(server.url + "/live") as response:  # on its old connection
            assert response.status == 200
    with pytest.raises(aiohttp.ClientError):
        async with aiohttp.ClientSession() as session:
            await session.get(server.url.replace("https", "http") + "/live")


@needs_openssl
def test_what_is_wrong_with_a_certificate_is_said_at_the_start(tmp_path):
    cert, key = make_pair(tmp_path, "one")
    other = make_pair(tmp_path, "other")
    encrypted = tmp_path / "encrypted.key"
    subprocess.run(
        [OPENSSL, "pkey", "-in", key, "-aes128", "-passout", "pass:x", "-out", encrypted],
        check=True,
    )
    both = tmp_path / "both.pem"
    both.write_text(Path(cert).read_text() + Path(key).read_text())
    Certificate(str(both), None)
    for pair, told in (
        ((cert, other[1]), "KEY_VALUES_MISMATCH"),
        ((cert, str(encrypted)), "encrypted"),
        ((cert, None), "PEM.*; without tls_key it has to hold the key"),
        ((str(tmp_path / "none"), None), "No such file or directory$"),
        ((str(tmp_path / "none"), key), "No such file"),
    ):
        with pytest.raises(ConfigError, match=f"tls_cert and tls_key: .*{told}"):
            Certificate(*pair)
    with pytest.raises(ConfigError, match="tls_key needs tls_cert"):
        ServerConfig(tls_key=key)
    with pytest.raises(ConfigError, match="tls_cert goes with host and port"):
        ServerConfig(tls_cert=cert, tls_key=key, uds="socket")


def test_a_server_that_is_open_to_all_says_so():
    with capture_logs() as logs:
        warn_of_open_door(ServerConfig(), "127.0.0.1")
        warn_of_open_door(ServerConfig(), "::1")
        warn_of_open_door(ServerConfig(api_key=("k",)), "0.0.0.0")
        assert not logs
        warn_of_open_door(ServerConfig(admin_key=("k",)), "0.0.0.0")
        warn_of_open_door(ServerConfig(), "::")
    assert [line["event"] for line in logs] == ["open_to_all"] * 2
