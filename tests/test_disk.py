"""What is on the disk when a file has been written, and how much memory a container leaves."""
import os
import stat

import pytest

from runs import linux
from support import disk
from support.disk import free_memory, write_atomically


def test_a_written_file_is_allowed_what_every_new_file_is(tmp_path):
    for umask in (0o077, 0o022):
        before = os.umask(umask)
        write_atomically(tmp_path / "file", lambda f: f.write(b"new"))
        os.umask(before)
        assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o666 & ~umask


def test_first_the_content_is_flushed_then_the_rename(tmp_path, monkeypatch):
    """Else a loss of power leaves an empty file, or the old one."""
    flushed, fsync = [], os.fsync

    def watched(handle):
        flushed.append(("folder" if stat.S_ISDIR(os.fstat(handle).st_mode) else "file", (tmp_path / "file").exists()))
        fsync(handle)

    monkeypatch.setattr(disk.os, "fsync", watched)
    write_atomically(tmp_path / "file", lambda f: f.write(b"new"))
    assert flushed == [("file", False), ("folder", True)]


@linux
def test_free_memory_is_that_of_this_machine():
    assert 2**20 < free_memory() < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


V2 = "sys/fs/cgroup"


@pytest.mark.parametrize("files, free", [
    ({}, 8_000_000 * 1024),
    ({"proc/self/cgroup": "0::/job", f"{V2}/job/memory.max": "900", f"{V2}/job/memory.current": "500"}, 400),
    # the cache of files, which is given up when memory is short, is free
    ({"proc/self/cgroup": "0::/job", f"{V2}/job/memory.max": "900", f"{V2}/job/memory.current": "500",
      f"{V2}/job/memory.stat": "anon 200\nfile 300\ninactive_file 100\nactive_file 50"}, 550),
    # the group around it allows less, and one of its own nothing at all
    ({"proc/self/cgroup": "0::/job/step", f"{V2}/job/step/memory.max": "max", f"{V2}/job/step/memory.current": "500",
      f"{V2}/job/memory.max": "700", f"{V2}/job/memory.current": "600"}, 100),
    ({"proc/self/cgroup": "0::/", f"{V2}/memory.max": "900", f"{V2}/memory.current": "1000"}, 0),
])
def test_free_memory_within_a_container(tmp_path, files, free):
    for name, text in {"proc/meminfo": "MemTotal: 9000000 kB\nMemAvailable: 8000000 kB\n", **files}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"{text}\n")
    assert free_memory(tmp_path) == free


def test_free_memory_is_unknown_where_the_system_says_nothing(tmp_path):
    assert free_memory(tmp_path) is None
