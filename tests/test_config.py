"""Settings: precedence, parsing, and errors that name what is wrong."""

import os
from pathlib import Path

import pytest

from ruvon.config import (
    CPU_STEP,
    GPU_STEP,
    VARIABLES,
    EngineConfig,
    ServerConfig,
    cache_root,
    load,
    parse_size,
    read_toml,
    unknown_variables,
)
from ruvon.errors import ConfigError


def test_argv_wins_over_environment_over_toml_over_default():
    toml = {"port": 1, "host": "toml", "max_logprobs": 3}
    environ = {"RUVON_PORT": "2", "RUVON_HOST": "environ"}
    config = load(ServerConfig, {"port": 3, "host": None}, environ, toml)
    assert (config.port, config.host, config.max_logprobs) == (3, "environ", 3)
    assert config.strict is ServerConfig().strict


def test_a_seed_of_nothing_is_refused():
    assert EngineConfig(seed=3, load_format="dummy").seed == 3
    with pytest.raises(ConfigError, match="seed 3 is for dummy weights"):
        EngineConfig(seed=3)


def test_an_empty_variable_counts_as_not_set():
    assert load(ServerConfig, environ={"RUVON_PORT": ""}).port == ServerConfig().port


def test_what_loses_is_not_looked_at():
    environ, toml = {"RUVON_PORT": "many"}, {"port": "many"}
    assert load(ServerConfig, {"port": 3}, environ, toml).port == 3
    assert load(ServerConfig, None, {"RUVON_PORT": "4"}, toml).port == 4


SERVICE = {
    "RUVON_PORT": "tcp://10.0.0.5:8000",
    "RUVON_PORT_8000_TCP": "tcp://10.0.0.5:8000",
    "RUVON_PORT_8000_TCP_ADDR": "10.0.0.5",
    "RUVON_SERVICE_HOST": "10.0.0.5",
    "RUVON_SERVICE_PORT": "8000",
    "RUVON_SERVICE_PORT_HTTP": "8000",
}
"""What a pod gets beside a service named ruvon."""


def test_variables_of_a_kubernetes_service_are_no_settings():
    assert load(ServerConfig, environ=SERVICE) == ServerConfig()
    assert load(ServerConfig, environ=SERVICE, toml={"port": 9}).port == 9
    (warning,) = unknown_variables(SERVICE)
    assert all(name in warning for name in (*SERVICE, "Kubernetes"))
    with pytest.raises(ConfigError, match="RUVON_STRICT must be true or false"):
        load(ServerConfig, environ={"RUVON_STRICT": "tcp://10.0.0.5:8000"})


@pytest.mark.parametrize(("text", "value"), [("1", True), ("off", False), ("TRUE", True)])
def test_booleans_in_the_environment(text, value):
    environ = {"RUVON_ENABLE_PREFIX_CACHING": text}
    assert load(EngineConfig, environ=environ).enable_prefix_caching is value


@pytest.mark.parametrize(
    ("environ", "told"),
    [
        ({"RUVON_PORT": "http://10.0.0.1:80"}, ["RUVON_PORT", "integer", "http://10.0.0.1:80"]),
        ({"RUVON_PORT": "70000"}, ["port", "65535", "70000"]),
        ({"RUVON_STRICT": "perhaps"}, ["RUVON_STRICT", "true or false", "perhaps"]),
        ({"RUVON_LOG_LEVEL": "loud"}, ["RUVON_LOG_LEVEL", "debug | info", "loud"]),
        ({"RUVON_MAX_BODY_SIZE": "8 megs"}, ["max_body_size", "8 megs", "512MiB"]),
        ({"RUVON_SHUTDOWN_TIMEOUT": "-1"}, ["shutdown_timeout", "at least 0"]),
        ({"RUVON_SHUTDOWN_TIMEOUT": "nan"}, ["shutdown_timeout", "at least 0", "nan"]),
        ({"RUVON_SHUTDOWN_TIMEOUT": "inf"}, ["shutdown_timeout", "at most 86400", "inf"]),
    ],
)
def test_a_bad_variable_is_named_with_its_choices(environ, told):
    with pytest.raises(ConfigError) as caught:
        load(ServerConfig, environ=environ)
    assert all(part in str(caught.value) for part in told), caught.value


@pytest.mark.parametrize(
    "fields",
    [
        {"device": "tpu"},
        {"threads": "2"},
        {"max_num_seqs": True},
        {"block_size": 0},
        {"gpu_memory_utilization": 1.5},
        {"kv_cache_memory": "0"},
        {"max_num_seqs": 64, "max_num_batched_tokens": 32},
        {"device": "cpu", "kernels": "triton"},
        {"device": "cuda", "kernels": "cpu"},
    ],
)
def test_a_config_built_in_python_gets_the_same_checks(fields):
    with pytest.raises(ConfigError, match=list(fields)[-1]):
        EngineConfig(**fields)


@pytest.mark.parametrize(
    ("device", "given", "largest"),
    [
        ("cpu", {}, CPU_STEP),
        ("cuda", {}, GPU_STEP),
        ("auto", {}, CPU_STEP),
        ("cuda", {"max_num_batched_tokens": 128}, (128, 128)),
        ("cuda", {"max_num_batched_tokens": 1024}, (256, 1024)),
        ("cuda", {"max_num_seqs": 8}, (8, 8192)),
        ("cpu", {"max_num_seqs": 600}, (600, 600)),
        ("cpu", {"max_num_seqs": 7, "max_num_batched_tokens": 9}, (7, 9)),
    ],
)
def test_the_largest_step_suits_the_device_and_what_is_given(device, given, largest):
    assert EngineConfig(device=device, **given).largest_step == largest
    assert (CPU_STEP, GPU_STEP) == ((64, 512), (256, 8192))  # as the help says


def test_toml_is_read_and_a_misspelt_key_is_named(tmp_path: Path):
    path = tmp_path / "ruvon.toml"
    path.write_text('model = "m"\nport = 9\nenable_prefix_caching = false\n')
    toml = read_toml(path)
    assert load(EngineConfig, environ={}, toml=toml).enable_prefix_caching is False
    path.write_text("max_num_sesq = 3\n")
    with pytest.raises(ConfigError, match=r"max_num_sesq.*did you mean max_num_seqs"):
        read_toml(path)
    path.write_text("qqq = 3\n")
    with pytest.raises(ConfigError, match=r"qqq.*known are .*batching.*port"):
        read_toml(path)


def test_toml_values_have_toml_types(tmp_path: Path):
    with pytest.raises(ConfigError, match="threads in the TOML file must be an integer"):
        load(EngineConfig, environ={}, toml={"threads": "2"})
    assert load(ServerConfig, environ={}, toml={"shutdown_timeout": 3}).shutdown_timeout == 3


@pytest.mark.parametrize("content", [b"port = ", b"\xff"])
def test_a_file_that_is_no_toml_is_a_config_error(tmp_path: Path, content: bytes):
    path = tmp_path / "broken.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"broken\.toml"):
        read_toml(path)
    with pytest.raises(ConfigError, match=r"missing\.toml"):
        read_toml(tmp_path / "missing.toml")


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1048576", 2**20),
        ("512MiB", 512 * 2**20),
        ("2 GiB", 2 * 2**30),
        ("2GB", 2 * 10**9),
        ("1.5k", 1500),
        ("3b", 3),
    ],
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "MiB", "1 apple", "-1", "0", "0MiB", "3ib", "9" * 400])
def test_what_is_no_size(text):
    with pytest.raises(ConfigError, match="size"):
        parse_size(text)


def test_variables_that_are_no_setting_are_told():
    known = {"RUVON_" + name.upper(): "x" for name in VARIABLES}
    environ = {"RUVON_PORT": "1", "RUVON_PROT": "1", "PATH": os.defpath, **known}
    assert unknown_variables(environ) == ["RUVON_PROT is not a setting of ruvon"]


@pytest.mark.parametrize(
    ("environ", "root"),
    [
        ({"RUVON_CACHE_DIR": "/mine", "XDG_CACHE_HOME": "/shared"}, Path("/mine")),
        ({"RUVON_CACHE_DIR": "", "XDG_CACHE_HOME": "/shared"}, Path("/shared/ruvon")),
        ({"XDG_CACHE_HOME": "not/absolute"}, Path("/me/.cache/ruvon")),
        ({}, Path("/me/.cache/ruvon")),
    ],
)
def test_where_things_are_kept_between_starts(monkeypatch, environ, root):
    monkeypatch.setenv("HOME", "/me")
    assert cache_root(environ) == root


@pytest.mark.parametrize("environ", [{}, {"RUVON_CACHE_DIR": "~/kept"}])
def test_a_user_without_a_home_keeps_nothing(monkeypatch, environ):
    def stranger(uid):
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", stranger)
    assert cache_root(environ) is None


@pytest.mark.parametrize(
    ("given", "environ", "toml", "keys"),
    [
        ({"api_key": ("a", "b,c")}, {"RUVON_API_KEY": "x"}, {}, ("a", "b", "c")),
        ({}, {"RUVON_API_KEY": "a, b"}, {"api_key": "x"}, ("a", "b")),
        ({}, {}, {"api_key": ["a", "b"]}, ("a", "b")),
        ({}, {}, {"api_key": "a"}, ("a",)),
        ({}, {"RUVON_API_KEY": ""}, {}, ()),
    ],
)
def test_several_texts(given, environ, toml, keys):
    assert load(ServerConfig, given, environ, toml).api_key == keys


@pytest.mark.parametrize("value", ["", "hidden,", "hidden hidden", "hiddén", ["hidden", 3], 3])
def test_a_bad_key_is_no_open_door_and_is_not_shown(value):
    with pytest.raises(ConfigError, match="api_key") as caught:
        load(ServerConfig, environ={}, toml={"api_key": value})
    assert "hidd" not in str(caught.value)


@pytest.mark.parametrize("value", ["chat.example.com", "https://a.com/", "https://*.a.com", ""])
def test_what_is_no_origin(value):
    with pytest.raises(ConfigError, match="cors_allow_origin"):
        load(ServerConfig, environ={}, toml={"cors_allow_origin": value})


@pytest.mark.parametrize(
    ("field", "least"),
    [
        ("max_connections", 1),
        ("max_connections_per_address", 0),
        ("max_logprobs", 0),
        ("resume_grace", 0),
        ("keep_alive_timeout", 1),
    ],
)
def test_the_least_that_may_be_set(field, least):
    assert getattr(ServerConfig(**{field: least}), field) == least
    with pytest.raises(ConfigError, match=f"{field} must be .*{least}"):
        ServerConfig(**{field: least - 1})


@pytest.mark.parametrize("field", ["tensor_parallel_size", "pipeline_parallel_size"])
def test_the_most_ranks_there_may_be(field):
    assert getattr(EngineConfig(**{field: 64}), field) == 64
    with pytest.raises(ConfigError, match=f"{field} must be .*64"):
        EngineConfig(**{field: 65})


@pytest.mark.parametrize(
    ("given", "is_keyed", "is_local"),
    [
        ({}, False, True),
        ({"api_key": ("a",)}, True, True),
        ({"api_key_file": "keys"}, True, True),
        ({"host": "0.0.0.0"}, False, False),
        ({"host": "::1"}, False, True),
        ({"host": "localhost"}, False, True),
        ({"host": "example.com"}, False, False),
        ({"uds": "socket"}, False, False),
    ],
)
def test_who_can_ask(given, is_keyed, is_local):
    config = ServerConfig(**given)
    assert (config.is_keyed, config.is_local, config.has_page) == (is_keyed, is_local, is_local)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"node_rank": 1}, "node_rank is for several machines"),
        ({"cluster_key": "k" * 16}, "cluster_key is for several machines"),
        ({"nnodes": 2}, "nnodes 2 must divide the 1 ranks"),
        ({"nnodes": 2, "tensor_parallel_size": 2}, "needs master_addr"),
        ({"nnodes": 2, "tensor_parallel_size": 2, "node_rank": 2}, "must be below nnodes 2"),
        ({"nnodes": 2, "pipeline_parallel_size": 2, "master_addr": "a"}, "at least 16 characters"),
    ],
)
def test_machines_that_cannot_share_ranks(given, told):
    with pytest.raises(ConfigError, match=told):
        EngineConfig(**given)


def test_the_key_of_machines_is_not_shown():
    key = "0123456789abcdef"
    config = EngineConfig(nnodes=2, tensor_parallel_size=2, master_addr="10.0.0.1", cluster_key=key)
    assert key not in repr(config)
