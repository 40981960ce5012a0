"""What deploy/ says of ruvon is so: settings, flags, paths and times. That its files are what other
programs read is `make deploy-check`'s."""

import re
import shlex
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from embedded import needs_model, running

from ruvon import __version__
from ruvon.cli import main
from ruvon.config import (
    EngineConfig,
    RouterConfig,
    ServerConfig,
    load,
    read_toml,
    unknown_variables,
)
from ruvon.router.replica import parse_url
from ruvon.server.app import ROUTES

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "deploy"
MANIFESTS = sorted((DEPLOY / "kubernetes").rglob("*.yaml"))
DOCKERFILE = (DEPLOY / "docker/Dockerfile").read_text()
UNIT = (DEPLOY / "systemd/ruvon.service").read_text()
COMPOSE = yaml.safe_load((DEPLOY / "compose/compose.yaml").read_text())


def objects(path: Path) -> Iterator[Any]:
    """Every mapping in a file of YAML, patches that it carries as text too."""
    waiting = list(yaml.safe_load_all(path.read_text()))
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            yield value
            waiting += [
                yaml.safe_load(child) if key == "patch" else child for key, child in value.items()
            ]
        elif isinstance(value, list):
            waiting += value


def manifest(name: str, kind: str) -> dict[str, Any]:
    return next(
        value for value in objects(DEPLOY / "kubernetes" / name) if value.get("kind") == kind
    )


def environments() -> Iterator[tuple[str, dict[str, str]]]:
    """RUVON_ variables, by the file that sets them."""
    yield "Dockerfile", dict(re.findall(r"(RUVON_\w+)=(\S+)", DOCKERFILE))
    yield "unit", dict(re.findall(r"^Environment=(RUVON_\w+)=(\S+)", UNIT, re.MULTILINE))
    yield "compose", COMPOSE["services"]["ruvon"]["environment"]
    for path in MANIFESTS:
        pairs = (value for value in objects(path) if str(value.get("name")).startswith("RUVON_"))
        yield path.name, {value["name"]: value["value"] for value in pairs}


@pytest.mark.parametrize(("where", "environ"), list(environments()))
def test_variables_are_settings_and_their_values_count(where: str, environ: dict[str, str]):
    given = {name: value for name, value in environ.items() if not value.startswith("${")}
    assert unknown_variables(given) == []
    for config in (EngineConfig, ServerConfig, RouterConfig):
        load(config, environ=given)


def test_the_settings_beside_the_unit_count():
    toml = read_toml(DEPLOY / "systemd/ruvon.toml")
    assert load(ServerConfig, environ={}, toml=toml).shutdown_timeout == toml["shutdown_timeout"]


def command_lines() -> Iterator[list[str]]:
    line = re.search(r"^ExecStart=\S+/ruvon (.*)$", UNIT, re.MULTILINE)[1]
    yield shlex.split(line.replace("/etc/ruvon", str(DEPLOY / "systemd")))
    yield re.search(r"^CMD \[\"(\w+)\"\]", DOCKERFILE, re.MULTILINE).groups()
    for path in MANIFESTS:
        for value in objects(path):
            args = value.get("args", value.get("value"))
            if isinstance(args, list) and args[0] in main.commands:
                yield args


@pytest.mark.parametrize("line", list(command_lines()), ids=" ".join)
def test_command_lines_are_understood(line: list[str]):
    command = main.commands[line[0]]
    with command.make_context(line[0], list(line[1:])) as context:
        for url in context.params.get("urls", ()):
            parse_url(url)


def test_probes_ask_what_the_server_answers():
    served = {route.path for route in ROUTES}
    asked = [value["path"] for path in MANIFESTS for value in objects(path) if "port" in value
             and str(value.get("path", "")).startswith("/")]  # fmt: skip
    assert set(asked) == {"/live", "/ready", "/metrics"} <= served
    assert "'/ready'" in DOCKERFILE


def seconds(text: str) -> float:
    return float(text.removesuffix("s"))


@pytest.mark.parametrize(
    ("name", "kind"),
    [("base/replicas.yaml", "StatefulSet"), ("components/router/router.yaml", "Deployment")],
)
def test_a_pod_may_drain_before_it_is_killed(name: str, kind: str):
    pod = manifest(name, kind)["spec"]["template"]["spec"]
    container = pod["containers"][0]
    environ = {value["name"]: value["value"] for value in container["env"]}
    drain = load(ServerConfig, environ=environ).shutdown_timeout
    sleep = seconds(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert sleep > 0
    assert pod["terminationGracePeriodSeconds"] >= sleep + drain + 10


def test_a_service_may_drain_before_it_is_killed():
    toml = read_toml(DEPLOY / "systemd/ruvon.toml")
    stop = seconds(re.search(r"^TimeoutStopSec=(\d+)$", UNIT, re.MULTILINE)[1])
    assert stop >= toml["shutdown_timeout"] + 10
    service = COMPOSE["services"]["ruvon"]
    drain = load(ServerConfig, environ=service["environment"]).shutdown_timeout
    assert seconds(service["stop_grace_period"]) >= drain + 10


def asked(url: str, key: str) -> int:
    """The status of an answer."""
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {key}"})
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        error.close()
        return error.code


@pytest.mark.slow
@needs_model
def test_the_unit_s_command_serves_with_its_settings_and_ends_when_told(tmp_path: Path):
    settings = (DEPLOY / "systemd/ruvon.toml").read_text().replace("/etc/ruvon", str(tmp_path))
    (tmp_path / "ruvon.toml").write_text(settings)
    (tmp_path / "api-keys").write_text("someone sk-one\n")
    (tmp_path / "admin-keys").write_text("sk-boss\n")
    line = re.search(r"^ExecStart=\S+/ruvon (.*)$", UNIT, re.MULTILINE)[1]
    words = shlex.split(line.replace("/etc/ruvon", str(tmp_path)))
    options = ("--host", "127.0.0.1", "--kv-cache-memory", "64MiB")
    with running(*options, program=("-m", "ruvon", *words), anew=True) as server:
        url = server.wait_for("listening")["url"]
        server.wait_for("ready")
        statuses = {
            (path, key): asked(f"{url}{path}", key)
            for path in ("/ready", "/v1/models", "/metrics", "/debug/steps")
            for key in ("", "sk-one", "sk-boss")
        }
        server.popen.terminate()
        assert server.popen.wait(30) == 0
    assert statuses == {
        ("/ready", ""): 200, ("/ready", "sk-one"): 200, ("/ready", "sk-boss"): 200,
        ("/v1/models", ""): 401, ("/v1/models", "sk-one"): 200, ("/v1/models", "sk-boss"): 200,
        ("/metrics", ""): 401, ("/metrics", "sk-one"): 403, ("/metrics", "sk-boss"): 200,
        ("/debug/steps", ""): 401, ("/debug/steps", "sk-one"): 403,
        ("/debug/steps", "sk-boss"): 200,
    }  # fmt: skip


def test_routers_know_every_replica_that_there_may_be():
    router = manifest("components/router/router.yaml", "Deployment")
    args = router["spec"]["template"]["spec"]["containers"][0]["args"]
    most = manifest("components/keda/scaledobject.yaml", "ScaledObject")["spec"]["maxReplicaCount"]
    assert args[1:] == [f"http://ruvon-{n}.ruvon-replicas:8000" for n in range(most)]


@pytest.mark.parametrize("path", [
    "deploy/kubernetes/components/keda/scaledobject.yaml", "docs/deployment.md",
    "deploy/prometheus/rules/ruvon.yml", "deploy/grafana/dashboards/ruvon.json",
    "deploy/grafana/dashboards/ruvon-router.json",
])  # fmt: skip
def test_expressions_name_metrics_that_there_are(path: str):
    known = (ROOT / "docs/reference/metrics.md").read_text() + (ROOT / "docs/router.md").read_text()
    names = re.findall(r"(?:vllm:|\bruvon_|\bhttp_)(\w+)", (ROOT / path).read_text())
    assert names
    for name in names:
        plain = re.sub(r"_(bucket|count|sum)$", "", name)
        assert any(f"`{prefix}{plain}`" in known for prefix in ("", "ruvon_", "http_")), name


def test_an_image_is_made_of_files_that_are_there():
    ignored = (DEPLOY / "docker/Dockerfile.dockerignore").read_text()
    for line in re.findall(r"^COPY (?!--from)(.*) \S+$", DOCKERFILE, re.MULTILINE):
        for name in line.split():
            assert (ROOT / name).exists()
            assert f"\n!{name}\n" in ignored


def test_images_are_of_this_version():
    files = [path for path in DEPLOY.rglob("*") if path.is_file()] + [ROOT / "docs/deployment.md"]
    pattern = r"\bruvon:(\d[\w.]*)-|newTag: ([\d.]+)-|ruvon-(\d[\d.]*\d)\b(?!\.ruvon)"
    named = [
        next(filter(None, found))
        for path in files
        for found in re.findall(pattern, path.read_text())
    ]
    assert set(named) == {__version__}
