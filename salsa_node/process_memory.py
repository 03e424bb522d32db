"""What a process group holds of the machine's memory, and whether the kernel has killed somebody for it (Linux)."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

_PROC = Path("/proc")


def held_bytes(group: int) -> int:
    """Bytes that the processes of that group hold for themselves: anonymous and shared memory, no cached files.

    0 where the group has no process any more, or where the machine does not tell.
    """
    held = 0
    with suppress(OSError):
        for folder in _PROC.iterdir():
            if folder.name.isdigit():
                with suppress(OSError, IndexError, ValueError):  # it ended meanwhile
                    if int((folder / "stat").read_text().rpartition(")")[2].split()[2]) == group:
                        held += _own_bytes((folder / "status").read_text())
    return held


def _own_bytes(status: str) -> int:
    fields = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
    return sum(int(fields[name].split()[0]) * 1024 for name in ("RssAnon", "RssShmem") if name in fields)


def killed_for_memory() -> int:
    """How often the kernel has killed a process of this control group, else of this machine, for want of memory."""
    with suppress(OSError, ValueError):
        own = (_PROC / "self/cgroup").read_text().strip().rpartition("::")[2]
        for events in (f"/sys/fs/cgroup{own}/memory.events", "/sys/fs/cgroup/memory.events"):
            if Path(events).exists():
                return _counted(Path(events).read_text(), "oom_kill")
        return _counted((_PROC / "vmstat").read_text(), "oom_kill")
    return 0


def _counted(lines: str, name: str) -> int:
    return next((int(line.split()[1]) for line in lines.splitlines() if line.split()[0] == name), 0)
