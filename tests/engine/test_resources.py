"""What the machine gives, read from files that a test writes."""

import os

import pytest

from ruvon.engine.resources import available_cores, available_memory, cores, cores_to_pin
from ruvon.errors import ConfigError


def fake_machine(root, files):
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text("MemTotal: 99 kB\nMemAvailable:   1000 kB\n")
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


CGROUP = "sys/fs/cgroup"
SIBLINGS = "sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 1_024_000),
        ({f"{CGROUP}/memory.max": "max\n"}, 1_024_000),
        (
            {
                f"{CGROUP}/memory.max": "500000\n",
                f"{CGROUP}/memory.current": "300000\n",
                f"{CGROUP}/memory.stat": "anon 1\ninactive_file 50000\nactive_file 7\n",
            },
            250_000,
        ),
        (
            {
                "proc/self/cgroup": "0::/user/app\n",
                f"{CGROUP}/user/app/memory.max": "400000",
                f"{CGROUP}/user/app/memory.current": "100000",
                f"{CGROUP}/user/app/memory.stat": "anon 1\n",
            },
            300_000,
        ),
        (
            {
                "proc/self/cgroup": "9:name=systemd:/x\n4:memory:/box\n",
                f"{CGROUP}/memory/memory.limit_in_bytes": "9223372036854771712",
                f"{CGROUP}/memory/box/memory.limit_in_bytes": "600000",
                f"{CGROUP}/memory/box/memory.usage_in_bytes": "500000",
                f"{CGROUP}/memory/box/memory.stat": "inactive_file 1\ntotal_inactive_file 2\n",
            },
            100_001,
        ),
        (
            {
                "proc/self/cgroup": "0::/user/app/inner\n",
                f"{CGROUP}/user/memory.max": "400000",
                f"{CGROUP}/user/memory.current": "150000",
                f"{CGROUP}/user/app/inner/memory.max": "max",
            },
            250_000,
        ),
        (
            {
                f"{CGROUP}/memory.max": "100",
                f"{CGROUP}/memory.current": "200",
                f"{CGROUP}/memory.stat": "",
            },
            0,
        ),
    ],
)
def test_a_containers_memory_limit_counts(tmp_path, files, expected):
    assert available_memory(fake_machine(tmp_path, files)) == expected


def test_half_the_memory_where_nothing_tells_what_is_free(tmp_path, monkeypatch):
    """Not Linux."""
    sizes = {"SC_PHYS_PAGES": 1000, "SC_PAGE_SIZE": 4096}
    monkeypatch.setattr(os, "sysconf", sizes.__getitem__)
    assert available_memory(tmp_path) == 2_048_000


LIMITS = """\
Limit                     Soft Limit           Hard Limit           Units
Max data size             {data}            unlimited            bytes
Max resident set          1            unlimited            bytes
Max address space         {space}           unlimited            bytes
"""


@pytest.mark.parametrize(
    ("data", "space", "expected"),
    [
        ("unlimited", "unlimited", 1_024_000),
        ("unlimited", "900000", 900_000 - 800 * 1024),
        ("500000", "900000", 900_000 - 800 * 1024),
        ("300000", "9000000", 300_000 - 200 * 1024),
        ("300000", "800", 0),
    ],
)
def test_a_process_own_limits_count(tmp_path, data, space, expected):
    files = {
        "proc/self/limits": LIMITS.format(data=data, space=space),
        "proc/self/status": "VmPeak:\t999 kB\nVmSize:\t     800 kB\nVmData:\t  200 kB\n",
    }
    assert available_memory(fake_machine(tmp_path, files)) == expected


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 64),
        ({f"{CGROUP}/cpu.max": "max 100000\n"}, 64),
        ({f"{CGROUP}/cpu.max": "400000 100000\n"}, 4),
        ({f"{CGROUP}/cpu.max": "150000 100000\n"}, 2),
        ({f"{CGROUP}/cpu.max": "1000 100000\n"}, 1),
        (
            {
                "proc/self/cgroup": "3:cpu,cpuacct:/box\n",
                f"{CGROUP}/cpu/cpu.cfs_quota_us": "-1",
                f"{CGROUP}/cpu/cpu.cfs_period_us": "100000",
                f"{CGROUP}/cpu/box/cpu.cfs_quota_us": "300000",
                f"{CGROUP}/cpu/box/cpu.cfs_period_us": "100000",
            },
            3,
        ),
    ],
)
def test_a_containers_processor_limit_counts(tmp_path, monkeypatch, files, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)), raising=False)
    assert available_cores(fake_machine(tmp_path, files)) == expected


@pytest.mark.parametrize("siblings", ["0-1 0-1 2-3 2-3", "0,2 1,3 0,2 1,3"])
def test_the_threads_of_a_core_count_once(tmp_path, monkeypatch, siblings):
    groups = siblings.split()
    root = fake_machine(tmp_path, {SIBLINGS.format(n): group for n, group in enumerate(groups)})
    for allowed, expected in ((range(4), 2), ({1}, 1), ({0, 3}, 2)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid, a=allowed: set(a), raising=False)
        assert available_cores(root) == len(cores(root)) == expected
        assert len({groups[cpu] for cpu in cores(root)}) == expected


def test_cores_are_those_this_process_may_run_on(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 5}, raising=False)
    assert available_cores(tmp_path) == 2


@pytest.mark.parametrize(
    ("allowed", "threads", "wanted", "expected"),
    [
        (range(8), 4, "auto", [0, 2, 4, 6]),  # the whole machine
        (range(8), 3, "auto", None),  # which of the four another may choose too
        ({0, 1, 2, 3}, 2, "auto", [0, 2]),  # given to us, with both threads of each core
        ({2, 5}, 2, "auto", [2, 5]),
        ({2, 4, 6}, 2, "auto", None),  # which of the three another may choose too
        ({2, 5}, 3, "auto", None),
        (range(8), 3, "on", [0, 2, 4]),
        ({2, 5}, 2, "off", None),
    ],
)
def test_threads_are_pinned_where_they_fill_the_cores(
    tmp_path, monkeypatch, allowed, threads, wanted, expected
):
    files = {SIBLINGS.format(n): f"{n & ~1}-{n | 1}" for n in range(8)}
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(allowed), raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    assert cores_to_pin(threads, wanted, fake_machine(tmp_path, files)) == expected


def test_more_threads_than_cores_cannot_be_pinned(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {1, 2}, raising=False)
    with pytest.raises(ConfigError, match="--pin-threads on: 3 threads"):
        cores_to_pin(3, "on", tmp_path)


def test_this_machine_has_memory_and_cores():
    assert available_memory() > 1 << 20
    assert available_cores() >= 1
