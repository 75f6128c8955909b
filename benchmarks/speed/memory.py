"""The memory of a process, as Linux's /proc tells it."""

from pathlib import Path


def status(field: str, pid: int | str = "self") -> int:
    """
    Bytes of a field of /proc/PID/status: `"VmRSS"`, what is resident now, or `"VmHWM"`, the most that was.

    Raises:
        OSError: there is no such process, or no /proc.
    """
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    raise OSError(f"/proc/{pid}/status has no {field}: the process ends")
