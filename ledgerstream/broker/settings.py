"""The broker's settings: flags over environment (LEDGERSTREAM_…) over a TOML file over defaults."""

from __future__ import annotations

import tomllib
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from ledgerstream.errors import ConfigError
from ledgerstream.limits import LIMITS

ADDRESS_FILE = "address"  # in data_dir while a broker serves it: host:port and its pid, for others


class Settings(BaseSettings):
    """Every setting of a broker. `ledgerstream config` prints what is in force."""

    model_config = SettingsConfigDict(env_prefix="LEDGERSTREAM_", extra="forbid", frozen=True)

    data_dir: Path = Field(
        default=Path("ledgerstream-data/log"), description="where the log's files are"
    )
    host: str = Field(default="127.0.0.1", description="address to listen on")
    port: int = Field(
        default=9092, ge=0, le=65535, description="port to listen on; 0 takes a free one"
    )
    advertised_host: str | None = Field(
        default=None, description="the address clients are told, if it is not `host`"
    )
    advertised_port: int | None = Field(
        default=None, ge=1, le=65535, description="the port clients are told, if it is not `port`"
    )
    node_id: int = Field(default=1, ge=0, description="this broker's id")
    durability: Literal["sync", "page-cache"] = Field(
        default="sync",
        description="`sync`: on disk before acknowledged. `page-cache`: as Kafka does by default, "
        "acknowledged once the operating system has it; a power cut loses what it had not written",
    )
    auto_create_topics: bool = Field(
        default=False, description="create a topic when a client first asks for it"
    )
    default_partitions: int = Field(
        default=1, ge=1, description="partitions of a topic that is created without saying how many"
    )
    two_phase_commit: bool = Field(
        default=False,
        description="allow transactions without timeout, which a client prepares and completes "
        "after it has decided elsewhere (KIP-939)",
    )
    group_delay_ms: int = Field(
        default=LIMITS.group_delay_ms,
        ge=0,
        description="an empty consumer group waits so long for more members before its first "
        "rebalance; embedded brokers, whose consumers come one at a time, have 0",
    )
    offsets_kept_hours: int = Field(
        default=LIMITS.offsets_kept_hours,
        ge=1,
        description="a group's offsets are forgotten so long after its last member has gone",
    )
    metrics_port: int | None = Field(
        default=None,
        ge=0,
        le=65535,
        description="Prometheus metrics and /healthz; 0 takes a free port",
    )
    log_format: Literal["text", "json"] = Field(
        default="text", description="the broker's own log lines"
    )


def load(file: Path | None = None, **flags: Any) -> Settings:
    """The settings in force. A flag that is None was not given. Raises ConfigError."""
    given = {name: value for name, value in flags.items() if value is not None}
    values: dict[str, Any] = {}
    if file is not None:
        try:
            values = tomllib.loads(file.read_text())
        except (OSError, tomllib.TOMLDecodeError) as error:
            raise ConfigError(f"The settings file {file} cannot be read: {error}.") from error
    try:
        from_environment = Settings().model_dump(exclude_unset=True)
        return Settings(**{**values, **from_environment, **given})
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            near = get_close_matches(name, Settings.model_fields, n=1)
            raise ConfigError(
                f"There is no setting {name!r}{f': is it {near[0]!r}?' if near else '.'}",
                "`ledgerstream config` lists every setting, its default and what it does.",
            ) from error
        raise ConfigError(
            f"The setting {name!r} is wrong: {first['msg']}.",
            "`ledgerstream config` lists every setting, its default and what it does.",
        ) from error
