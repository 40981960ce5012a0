"""Compiled kernels on disk: a convenience that must never keep anybody from starting."""

import os
import subprocess
import time

import forked
import pytest
import structlog

from ruvon.errors import ConfigError
from ruvon.kernels.cpu import compiled, isa
from ruvon.kernels.cpu.compiled import FORGOTTEN_AFTER, Compiled, Store, name_of, open_store
from ruvon.kernels.cpu.isa import ISAS, choose, supported, target_features
from ruvon.kernels.cpu.jit import build as builder

KEY = ("copy", None)


def kept(folder):
    return sorted((path.name, path.stat().st_mtime_ns) for path in folder.rglob("*.o"))


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RUVON_CACHE_DIR", str(tmp_path))
    return tmp_path


def test_code_is_kept_and_found_again(cache):
    assert Compiled(choose(None)).address(KEY) > 0
    files = kept(cache)
    assert len(files) == 1
    again = Compiled(choose(None))
    assert again.address(KEY) == again.address(KEY) > 0
    assert kept(cache) == files  # nothing was compiled a second time


def test_what_is_kept_is_loaded_without_the_compiler(cache):
    Compiled(choose(None)).address(KEY)
    script = """
import sys
from ruvon.kernels.cpu.compiled import Compiled
from ruvon.kernels.cpu.isa import choose
assert Compiled(choose(None)).address(("copy", None)) > 0
print("numba" in sys.modules)
"""
    assert forked.run(["-c", script], os.environ) == (0, "False\n")


def test_what_is_sure_to_be_needed_is_compiled_meanwhile(cache, monkeypatch):
    monkeypatch.setattr(compiled, "USUAL", (KEY,))
    code = Compiled(choose(None), cores=2)
    monkeypatch.setattr(compiled, "build", None)  # not here
    assert code.address(KEY) > 0
    assert len(kept(cache)) == 1


def test_who_still_compiles_is_ended_with_the_rest(cache, monkeypatch):
    helpers, popen = [], subprocess.Popen

    def watched(*arguments, **named):
        helpers.append(popen(*arguments, **named))
        return helpers[-1]

    monkeypatch.setattr(compiled.subprocess, "Popen", watched)
    Compiled(choose(None), cores=2).close()
    (helper,) = helpers
    assert helper.returncode is not None


@pytest.mark.parametrize("executable", ["/bin/false", "/no/such/program", ""])
def test_what_another_process_does_not_do_is_done_here(cache, monkeypatch, executable):
    monkeypatch.setattr(compiled, "USUAL", (KEY,))
    monkeypatch.setattr(compiled.sys, "executable", executable)
    assert Compiled(choose(None), cores=2).address(KEY) > 0


def test_kinds_of_a_kernel_are_kept_apart(cache):
    code = Compiled(choose(None))
    addresses = {code.address(("embed", kind)) for kind in (0, 1)}
    assert len(addresses) == len(kept(cache)) == 2


@pytest.mark.parametrize("kernel", ["linear", "experts", "attention"])
def test_instruction_sets_are_kept_apart_where_they_differ(kernel):
    best, portable = choose(None), choose("portable")
    names = {name_of((kernel, 0), isa) for isa in (best, portable)}
    assert len(names) == len({best, portable})


@pytest.mark.parametrize("damage", [b"", b"no object file", None])
def test_damaged_code_is_compiled_again(cache, damage):
    Compiled(choose(None)).address(KEY)
    (path,) = cache.rglob("*.o")
    path.write_bytes(path.read_bytes()[:-1] if damage is None else damage)
    assert Compiled(choose(None)).address(KEY) > 0
    store = open_store()
    assert store.read(path.name)


def test_a_folder_that_cannot_be_written_to_is_told_of_once(tmp_path):
    (tmp_path / "file").touch()
    store = Store(tmp_path / "file" / "kernels")
    with structlog.testing.capture_logs() as logs:
        store.write("a", b"code")
        store.write("b", b"code")
    assert [line["event"] for line in logs] == ["kernels_not_kept"]
    assert store.read("a") is None


def test_a_full_disk_leaves_no_half_a_file(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    store = Store(tmp_path)
    monkeypatch.setattr(compiled.os, "replace", fail)
    store.write("a", b"code")
    assert not [*tmp_path.iterdir()]


def test_code_of_old_versions_is_removed(cache):
    for name, age in (("kernels-old", FORGOTTEN_AFTER + 60), ("kernels-new", 60)):
        (cache / name).mkdir()
        os.utime(cache / name, (time.time() - age,) * 2)
    Compiled(choose(None)).address(KEY)
    Compiled(choose(None))
    names = {path.name for path in cache.iterdir()}
    assert names == {"kernels-new", f"kernels-{compiled.IMPORTED}"}


def test_without_a_home_code_is_compiled_anyway(monkeypatch):
    monkeypatch.setattr(compiled, "cache_root", lambda: None)
    assert Compiled(choose(None)).address(KEY) > 0


def test_code_of_edited_sources_is_not_kept(cache, monkeypatch):
    monkeypatch.setattr(compiled, "IMPORTED", "something else")
    assert Compiled(choose(None)).address(KEY) > 0
    assert not kept(cache)


CPUS = {
    "zen 5": ("x86_64", "avx512-bf16", "avx2 fma f16c avx512f avx512bw avx512vnni avx512bf16"),
    "ice lake": ("x86_64", "avx512-vnni", "avx2 fma f16c avx512f avx512bw avx512vnni"),
    "skylake server": ("x86_64", "avx512", "avx2 fma f16c avx512f avx512bw"),
    "alder lake": ("x86_64", "avx-vnni", "avx2 fma f16c avxvnni"),
    "zen 3": ("x86_64", "avx2", "avx2 fma f16c"),
    "sandy bridge": ("x86_64", "portable", "avx"),
    "graviton 3": ("aarch64", "i8mm", "dotprod i8mm"),
    "graviton 2": ("aarch64", "dotprod", "dotprod"),
    "raspberry pi 4": ("aarch64", "portable", ""),
    "apple": ("arm64", "i8mm", "dotprod i8mm"),
}


@pytest.mark.parametrize("name", CPUS)
def test_each_cpu_gets_its_best_instruction_set(monkeypatch, name):
    machine, best, features = CPUS[name]
    monkeypatch.setattr(isa.platform, "machine", lambda: machine)
    monkeypatch.setattr(isa, "host_features", lambda: dict.fromkeys(features.split(), True))
    assert choose(None).name == best
    for other in ISAS:
        if other in supported():
            assert choose(other.name) is other
        else:
            with pytest.raises(ConfigError, match=f"--cpu-isa {other.name}: this CPU has {best}"):
                choose(other.name)


def test_a_lesser_set_uses_nothing_of_a_better_one(monkeypatch):
    features = "avx2 fma f16c avxvnni avx512f avx512bw avx512vl avx512vnni avx512bf16 avx10.1"
    monkeypatch.setattr(isa, "host_features", lambda: dict.fromkeys(features.split(), True))
    by_name = {each.name: target_features(each).split(",") for each in ISAS}
    assert "+avx2" in by_name["avx2"]
    assert {"-avxvnni", "-avx512f", "-avx512vl", "-avx10.1"} <= {*by_name["avx2"]}
    assert {"+avxvnni", "-avx512vl"} <= {*by_name["avx-vnni"]}
    assert "+avx512bf16" in by_name["avx512-bf16"]


X86 = "x86_64-unknown-linux-gnu", "x86-64-v3"
ARM = "aarch64-unknown-linux-gnu", "generic"
INSTRUCTIONS = [
    ("avx2", *X86, "+avx2,+fma,+f16c", 0, "vpmaddubsw", "vpdpbusd"),
    ("avx2", *X86, "+avx2,+fma,+f16c", 4, "vpsignb", "vpdpbusd"),
    ("avx-vnni", *X86, "+avx2,+fma,+f16c,+avxvnni", 0, "vpdpbusd", "zmm"),
    ("avx512", *X86, "+avx512f,+avx512bw", 0, "vpmaddubsw", "vpdpbusd"),
    ("avx512-vnni", *X86, "+avx512f,+avx512bw,+avx512vnni", 4, "vpdpbusd", "vpmadd"),
    ("dotprod", *ARM, "+dotprod", 4, "sdot", "usdot"),
    ("i8mm", *ARM, "+dotprod,+i8mm", 4, "\tusdot", "\tsdot"),
]


@pytest.mark.parametrize(
    ("name", "triple", "cpu", "features", "kind", "has", "has_not"), INSTRUCTIONS
)
def test_products_become_the_instructions_they_should(
    name, triple, cpu, features, kind, has, has_not
):
    """Compiled for CPUs that we are not on, looked at as assembly."""
    (chosen,) = (each for each in ISAS if each.name == name)
    text = builder.assembly(("linear", kind), chosen, "kernel", triple, cpu, features)
    assert has in text
    assert has_not not in text
