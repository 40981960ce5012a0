"""How the engine is offered over HTTP."""

from __future__ import annotations

import re
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Literal

from ruvon.config.fields import check_fields, setting
from ruvon.errors import ConfigError

KEY = (r"[\x21-\x2b\x2d-\x7e]+", "printable ASCII without spaces and commas")
ORIGIN = (r"\*|[a-z][a-z0-9+.-]*://[^\s/,*]+", "an origin like https://chat.example.com, or *")

A_DAY = 86_400.0  # seconds; an event loop's timers have an end


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """How the engine is offered over HTTP."""

    host: str = setting(
        "127.0.0.1", "Address to listen on. 0.0.0.0 is all of IPv4, :: all of IPv6 and IPv4."
    )
    port: int = setting(8000, "Port to listen on. 0 picks a free one.", least=0, most=65535)
    uds: str | None = setting(
        None, "Unix socket to listen on, instead of host and port: a path in a folder that exists."
    )
    served_model_name: str | None = setting(
        None, "Name in the API. Default: the model's own. Several, comma-separated, are aliases."
    )
    chat_template: str | None = setting(None, "File with a Jinja chat template to use instead.")
    api_key: tuple[str, ...] = setting(
        (),
        "Key without which only /live and /ready answer. Several: repeated, or comma-separated. "
        "The variable and the file keep it out of the list of processes.",
        form=KEY,
        secret=True,
    )
    api_key_file: str | None = setting(
        None,
        "File with more of them, on each line one, or a name and one, or these and a weight, with "
        "which a busy server is shared: keys with one name are one tenant's. It counts anew when "
        "it changes.",
    )
    admin_key: tuple[str, ...] = setting(
        (),
        "Key for /metrics, for what begins with /debug/, and for everything else. Several as of "
        "--api-key.",
        form=KEY,
        secret=True,
    )
    admin_key_file: str | None = setting(None, "File with more of them, as --api-key-file.")
    share_prefix_cache: bool = setting(
        False,
        "Reuse cached prefixes across keys. Faster where all have one system prompt, but the time "
        "to the first token then tells one key what others have asked.",
    )
    tls_cert: str | None = setting(
        None,
        "PEM file with the server's certificate and those it was signed with: the server speaks "
        "HTTPS. It and its key count anew when they change.",
    )
    tls_key: str | None = setting(
        None, "PEM file with its key, not encrypted. Default: it is in the certificate's file."
    )
    cors_allow_origin: tuple[str, ...] = setting(
        (),
        "Origin of web pages that may read answers, such as https://chat.example.com; * is any. "
        "Several: repeated, or comma-separated. Default: none.",
        form=ORIGIN,
    )
    max_logprobs: int = setting(20, "Most alternatives a request may ask for.", least=0)
    max_body_size: str = setting("4MiB", "Larger request bodies get a 413.", unit="size")
    max_connections: int = setting(
        4096, "Connections that may be open; more are answered with a 503 and closed.", least=1
    )
    max_connections_per_address: int = setting(
        1024,
        "Connections that one address may have of them, of IPv6 one network of 64 bits. 0: no such "
        "bound. This machine's own clients have none.",
        least=0,
    )
    keep_alive_timeout: float = setting(
        75.0,
        "Seconds after which a connection without a request is closed. It must be longer than a "
        "proxy's own before this server.",
        least=1,
        most=A_DAY,
    )
    sse_keep_alive_interval: float = setting(
        15.0, "Seconds of silence in a stream before a comment line.", least=0.1, most=A_DAY
    )
    resume_grace: float = setting(
        30.0,
        "Seconds in which a dropped stream can be gone on with, by a client that has asked for it "
        "with X-Ruvon-Resume. 0: never.",
        least=0,
        most=3600,
    )
    request_timeout: float | None = setting(
        None,
        "Seconds that a request may take, its time in the queue too; a request may ask for less "
        "with timeout or X-Request-Timeout. Default: no limit.",
        least=0.001,
        most=A_DAY,
    )
    rate_limit_requests: int | None = setting(
        None,
        "Requests per minute of one key, or of all together without keys. Default: no limit.",
        least=1,
    )
    rate_limit_tokens: int | None = setting(
        None, "The same in tokens, of prompts and answers together. Default: no limit.", least=1
    )
    watchdog_timeout: float = setting(
        300.0,
        "Seconds without a finished step, though there is work, after which the server writes what "
        "it was doing to the log and exits with code 70. 0: never.",
        least=0,
        most=A_DAY,
    )
    shutdown_timeout: float = setting(
        30.0, "Seconds that running requests get after SIGTERM.", least=0, most=A_DAY
    )
    store_responses: bool = setting(
        True, "Keep what /v1/responses answers, for previous_response_id and for reading it again."
    )
    response_store_size: str = setting(
        "64MiB", "Most memory for it; what was used longest ago goes first.", unit="size"
    )
    response_store_ttl: float = setting(
        3600.0, "Seconds that a response is kept after it was last used.", least=1, most=A_DAY
    )
    ui: bool | None = setting(
        None,
        "Serve the page at /: a chat, and a view of the engine at work. What it shows needs the "
        "keys that there are. Default: on an address of this machine alone, yes, else no.",
    )
    ui_step_gate: bool = setting(
        False,
        "Let whoever watches the engine in the page slow it down, step by step, for all requests.",
    )
    strict: bool = setting(False, "Refuse unknown request fields instead of reporting them.")
    log_level: Literal["debug", "info", "warning", "error"] = setting("info", "Least level shown.")
    log_format: Literal["auto", "console", "json"] = setting(
        "auto", "auto: console on a terminal, JSON elsewhere."
    )
    log_requests: bool = setting(True, "One line for each request.")
    otlp_traces_endpoint: str | None = setting(
        None,
        "URL to which OpenTelemetry traces of requests are sent (OTLP over HTTP), such as "
        "http://localhost:4318/v1/traces. Needs ruvon[otel].",
    )
    otlp_metrics_endpoint: str | None = setting(
        None,
        "The same for OpenTelemetry's GenAI metrics, such as http://localhost:4318/v1/metrics. "
        "Prometheus needs neither.",
    )

    def __post_init__(self) -> None:
        check_fields(self)
        if self.tls_key is not None and self.tls_cert is None:
            raise ConfigError("tls_key needs tls_cert, the certificate that it belongs to")
        if self.tls_cert is not None and self.uds is not None:
            raise ConfigError("tls_cert goes with host and port: nothing is encrypted on uds")
        for name in ("otlp_traces_endpoint", "otlp_metrics_endpoint"):
            url = getattr(self, name)
            if url is not None and not re.fullmatch(r"https?://[^\s/]+\S*", url):
                raise ConfigError(f"{name} must be a URL of http or https, got {url!r}")

    @property
    def is_keyed(self) -> bool:
        """Whether asking needs a key."""
        return bool(self.api_key) or self.api_key_file is not None

    @property
    def is_local(self) -> bool:
        """Whether only this machine's own processes reach it."""
        return self.uds is None and is_loopback(self.host)

    @property
    def has_page(self) -> bool:
        """Whether there is a page at ``/``."""
        return self.is_local if self.ui is None else self.ui

    @property
    def scheme(self) -> str:
        """What the server's address begins with."""
        return "http" if self.tls_cert is None else "https"


def is_loopback(name: str) -> bool:
    """Whether a host's name or address is this machine's own."""
    try:
        return ip_address(name).is_loopback
    except ValueError:
        return name == "localhost"
