"""How commands are let in at `--log`: LEDGERSTREAM_LOG_… over `--log-config` over defaults."""

from __future__ import annotations

from pathlib import Path

from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from ledgerstream.client.properties import read_properties
from ledgerstream.client.security import Security

PREFIX = "LEDGERSTREAM_LOG_"


class LogSettings(BaseSettings, Security):
    """`Security` as the environment and a file give it. `ledgerstream config` prints it."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, env_ignore_empty=True, extra="forbid", frozen=True,
        hide_input_in_errors=True,
    )  # fmt: skip

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return env_settings, init_settings  # what it is made with comes from the file


def load(file: Path | str | None) -> LogSettings:
    """Raises ConfigError."""
    return LogSettings(**({} if file is None else read_properties(Path(file))))
