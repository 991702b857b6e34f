"""Keeps one embedded Postgres for as long as somebody uses it. Started by `postgres.py`, by path
and without site packages, so it imports nothing of ours: a few megabytes, and gone with the server.

Who uses the server holds a shared lock on `users.lock`; the kernel gives it up for a process that
is killed. The keeper starts the server (again, should it die), and stops it when it can have that
lock for itself. While it lives it holds `keeper.lock`.

    keeper.py DIRECTORY SOCKET_DIRECTORY UID GID POSTGRES [OPTION …]
"""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

POLL_S = 0.1
# In a row, without the server having come up. Each waits longer than the one before (11 s in all):
# what a killed server leaves behind may keep the next one from starting for a moment.
STARTS_MAX = 7
PAUSE_S_MAX = 5.0


def main() -> int:
    directory, sockets, uid, gid, postgres, *options = sys.argv[1:]
    home = Path(directory)
    keeper_lock = os.open(home / "keeper.lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(keeper_lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return 0  # another keeper was quicker
    users_lock = os.open(home / "users.lock", os.O_RDWR | os.O_CREAT, 0o600)
    stopping = []
    signal.signal(signal.SIGTERM, lambda *_: stopping.append(1))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the users

    command = [postgres, "-D", str(home / "data"), "-k", sockets, *options]
    as_user = {} if int(uid) == os.geteuid() else {"user": int(uid), "group": int(gid)}
    server: subprocess.Popen[bytes] | None = None
    adopted = running_pid(home)
    starts = 0
    with (home / "server.log").open("ab") as log:
        while not stopping:
            if adopted is not None and not alive(adopted):
                adopted = None
            if adopted is None and (server is None or server.poll() is not None):
                if server is not None and came_up(home, server.pid):
                    starts = 0
                if starts == STARTS_MAX:
                    return 1
                if starts:
                    time.sleep(min(POLL_S * 2**starts, PAUSE_S_MAX))
                starts += 1
                server = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    cwd=home / "data",
                    extra_groups=[] if as_user else None,
                    **as_user,  # type: ignore[call-overload]
                )
            try:
                fcntl.flock(users_lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(POLL_S)
    pid = server.pid if server is not None else adopted
    if pid is not None and alive(pid):
        os.kill(pid, signal.SIGINT)  # Postgres' fast shutdown: a checkpoint, then out
    if server is not None:
        server.wait()
    else:
        while adopted is not None and alive(adopted):
            time.sleep(POLL_S)
    if Path(sockets).parent != home:  # a short path of its own, where the data lies too deep
        try:
            os.rmdir(sockets)
        except OSError:
            pass
    return 0


def running_pid(home: Path) -> int | None:
    """A server that an earlier keeper left behind. Its number may be another server's by now."""
    try:
        lines = (home / "data" / "postmaster.pid").read_text().splitlines()
        pid = int(lines[0])
        name, *args = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except (OSError, ValueError, IndexError):
        return None
    return pid if name.endswith(b"postgres") and os.fsencode(home / "data") in args else None


def came_up(home: Path, pid: int) -> bool:
    """Whether a server that died had been ready: its file says so, and stays behind."""
    try:
        lines = (home / "data" / "postmaster.pid").read_text().splitlines()
    except OSError:
        return False
    return len(lines) == 8 and lines[0] == str(pid) and lines[7].strip() == "ready"


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


if __name__ == "__main__":
    sys.exit(main())
