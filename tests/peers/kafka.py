"""A real Apache Kafka on loopback, and its tools, from the jars that `make peers` brings."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

LIBS = Path(__file__).parents[2] / "build" / "kafka" / "libs"
VERSION = "4.3.0"
START_SECONDS_MAX = 60


def why_absent() -> str | None:
    """Why there is no Apache Kafka here, or None if there is one."""
    if shutil.which("java") is None:
        return "no Java here: Apache Kafka cannot be run beside us"
    if not any(LIBS.glob("kafka_2.13-*.jar")):
        return "Apache Kafka's jars are not in build/kafka/libs: `make peers` brings them"
    return None


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


def tool(name: str, *arguments: object, timeout: float = 120, heap: str = "256m") -> str:
    """Run one of Kafka's tools (a class name); its output. Raises CalledProcessError."""
    done = subprocess.run(
        _java(heap) + [name, *map(str, arguments)],
        capture_output=True, text=True, timeout=timeout, check=False,
    )  # fmt: skip
    if done.returncode != 0:
        raise subprocess.CalledProcessError(
            done.returncode, name, done.stdout[-4000:], done.stderr[-4000:]
        )
    return done.stdout


def _java(heap: str) -> list[str]:
    return ["java", f"-Xmx{heap}", "-cp", f"{LIBS}/*"]


@dataclass
class ApacheKafka:
    """One broker and controller in a directory of its own; `at` is address by listener."""

    process: subprocess.Popen[bytes]
    address: str
    directory: Path
    at: dict[str, str]

    @classmethod
    def start(
        cls,
        directory: Path,
        heap: str = "1g",
        *,
        listeners: Mapping[str, str] | None = None,
        scram: Sequence[str] = (),
        **settings: object,
    ) -> ApacheKafka:
        """Format and start; answers when this returns.

        listeners: name → protocol of those besides PLAINTEXT, at localhost; scram: `--add-scram`.
        """
        directory.mkdir(parents=True, exist_ok=True)
        port, controller = free_port(), free_port()
        at = {name: f"localhost:{free_port()}" for name in listeners or {}}
        also = "".join(f",{name}://{address}" for name, address in at.items())
        protocols = {"PLAINTEXT": "PLAINTEXT", "CONTROLLER": "PLAINTEXT", **(listeners or {})}
        values = {
            "process.roles": "broker,controller",
            "node.id": 1,
            "controller.quorum.voters": f"1@127.0.0.1:{controller}",
            "listeners": f"PLAINTEXT://127.0.0.1:{port},CONTROLLER://127.0.0.1:{controller}{also}",
            "advertised.listeners": f"PLAINTEXT://127.0.0.1:{port}{also}",
            "listener.security.protocol.map": ",".join(map(":".join, protocols.items())),
            "controller.listener.names": "CONTROLLER",
            "log.dirs": directory / "data",
            "offsets.topic.replication.factor": 1,
            "transaction.state.log.replication.factor": 1,
            "transaction.state.log.min.isr": 1,
            "group.initial.rebalance.delay.ms": 0,
            **settings,
        }
        config = directory / "server.properties"
        config.write_text("".join(f"{name}={value}\n" for name, value in values.items()))
        tool("kafka.tools.StorageTool", "format", "-t", "bGVkZ2Vyc3RyZWFtLXRlcw", "-c", config,
             *(word for user in scram for word in ("--add-scram", user)))  # fmt: skip
        quiet = directory / "log4j2.properties"
        quiet.write_text("rootLogger.level=ERROR\n")
        with (directory / "out").open("wb") as out:
            process = subprocess.Popen(
                ["java", f"-Xmx{heap}", f"-Dlog4j2.configurationFile={quiet}",
                 "-cp", f"{LIBS}/*", "kafka.Kafka", str(config)],
                stdout=out, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        kafka = cls(process, f"127.0.0.1:{port}", directory, at)
        kafka._wait_ready(port)
        return kafka

    def _wait_ready(self, port: int) -> None:
        deadline = time.monotonic() + START_SECONDS_MAX
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                break
            try:
                with socket.create_connection(("127.0.0.1", port), 1) as sock:
                    # ApiVersions v0: answered once the broker serves
                    sock.sendall(bytes.fromhex("0000000a0012000000000001ffff"))
                    if sock.recv(4):
                        return
            except OSError:
                time.sleep(0.1)
        self.stop()
        raise RuntimeError(f"Apache Kafka did not start: {(self.directory / 'out').read_text()}")

    @property
    def pid(self) -> int:
        return self.process.pid

    def stop(self) -> None:
        """End it at once: nothing here outlives its test."""
        if self.process.poll() is None:
            os.kill(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()
