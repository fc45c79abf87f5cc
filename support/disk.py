"""Files that are never half written, JSON of unknown origin, and how much memory is left.

A leaf module, as support/bounds.py is.
"""
import errno
import json
import math
import os
import stat
import uuid
from contextlib import suppress
from pathlib import Path


def write_atomically(path: Path, write):
    """`write(file)` into a neighbour, then renamed: whenever the process dies, `path` holds the old content or the new.

    Once this has returned, the new content survives a loss of power too. Raises OSError.
    """
    temporary = path.with_name(f".{path.name[:100]}.{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "xb") as f:  # x: a file of our own, and no link that lies there is followed
            write(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    flush_folder(path.parent)


def no_link(path, flags: int) -> int:
    """An `opener` of open(): follows no link and waits for no pipe. Raises OSError for what is no regular file."""
    handle = os.open(path, flags | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0), 0o666)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(errno.EINVAL, "it is no regular file; remove it", str(path))
    return handle


def make_folder(folder: Path):
    """With those around it, so that their names survive a loss of power. Raises OSError."""
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        flush_folder(folder.parent)


def flush_folder(folder: Path):
    """Has the disk keep the names in the folder: a rename is lost with the power until then."""
    with suppress(OSError):  # Windows opens no folder, and some network disks flush none
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def read_json(path: Path):
    """What a JSON file holds. Raises OSError, and ValueError as `parse_json`."""
    return parse_json(path.read_bytes())


def parse_json(text: str | bytes):
    """JSON that anyone may have written -> plain values; their types are checked by whoever asked for them.

    Raises ValueError for what is no JSON, and for numbers that are not finite.
    """
    try:
        return json.loads(text, parse_float=_finite, parse_constant=_finite)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"the number {digits[:20]} is not finite")
    return value


def free_memory(root: Path = Path("/")) -> int | None:
    """Bytes of memory that this process can still take: of the machine, and within its control groups (version 2), as
    containers and clusters use them. None where the system says nothing, as outside of Linux.

    root: where /proc and /sys lie.
    """
    free = [1024 * int(line.split()[1]) for line in _lines(root / "proc/meminfo") if line.startswith("MemAvailable:")]
    for line in _lines(root / "proc/self/cgroup"):
        if line.startswith("0::"):
            group = root / "sys/fs/cgroup" / line.removeprefix("0::").lstrip("/")
            for folder in (group, *group.parents):  # each of them may have a limit
                most, used = _lines(folder / "memory.max"), _lines(folder / "memory.current")
                if most and used and most[0] != "max":
                    cached = [int(line.split()[1]) for line in _lines(folder / "memory.stat")
                              if line.startswith(("inactive_file ", "active_file "))]  # given up when memory is short
                    free.append(max(0, int(most[0]) - int(used[0]) + sum(cached)))
    return min(free) if free else None


def _lines(path: Path) -> list[str]:
    """[] where there is no such file."""
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
