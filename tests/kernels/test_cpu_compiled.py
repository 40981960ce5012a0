"""Compiled kernels on disk."""

import numba
import pytest

from ruvon.kernels.cpu import compiled
from ruvon.kernels.cpu.compiled import Compiled


def kept(folder):
    return sorted((path.name, path.stat().st_mtime_ns) for path in folder.rglob("*.nbc"))


def test_code_is_kept_and_found_again(tmp_path, monkeypatch):
    monkeypatch.setenv("RUVON_CACHE_DIR", str(tmp_path))
    setting = numba.config.CACHE_DIR
    assert Compiled().address(("add", None)) > 0
    files = kept(tmp_path)
    assert len(files) == 1
    again = Compiled()
    assert again.address(("add", None)) > 0
    assert again.address(("add", None)) == again.address(("add", None))
    assert kept(tmp_path) == files  # nothing was compiled a second time
    assert setting == numba.config.CACHE_DIR


def test_kinds_of_a_kernel_are_kept_apart(tmp_path, monkeypatch):
    monkeypatch.setenv("RUVON_CACHE_DIR", str(tmp_path))
    code = Compiled()
    addresses = {code.address(("embed", kind)) for kind in (0, 1)}
    assert len(addresses) == len(kept(tmp_path)) == 2


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_each_dot_product_is_used_where_the_cpu_has_it(monkeypatch, machine):
    features = {"avx512f": True, "avx512bw": True, "avx512vnni": True}
    monkeypatch.setattr(compiled.platform, "machine", lambda: machine)
    monkeypatch.setattr(compiled.binding, "get_host_cpu_features", lambda: features)
    assert compiled.has_vnni() == (machine == "x86_64")
    assert not compiled.has_bf16()
    features["avx512bf16"] = True
    assert compiled.has_bf16() == (machine == "x86_64")


@pytest.mark.parametrize("folder", ["/proc/nowhere", None])
def test_without_a_place_to_keep_it_code_is_compiled_anyway(folder, tmp_path, monkeypatch):
    if folder is None:  # the sources have changed since they were imported
        folder = str(tmp_path)
        monkeypatch.setattr(compiled, "IMPORTED", "something else")
    monkeypatch.setenv("RUVON_CACHE_DIR", folder)
    assert Compiled().address(("add", None)) > 0
    assert not kept(tmp_path)
