"""How commands are let in at `--log`: LEDGERSTREAM_LOG_… over `--log-config` over defaults."""

from __future__ import annotations

import os
from difflib import get_close_matches
from pathlib import Path

from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from ledgerstream.broker.settings import Settings
from ledgerstream.client.properties import read_properties
from ledgerstream.client.security import Security
from ledgerstream.errors import ConfigError

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
    """Raises ConfigError, also for a variable that is none: it may be what kept others out."""
    known = [PREFIX + name.upper() for name in LogSettings.model_fields]
    others = [f"LEDGERSTREAM_{name.upper()}" for name in ("log_config", *Settings.model_fields)]
    for name in os.environ:
        if name.upper().startswith(PREFIX) and name.upper() not in (*known, *others):
            near = get_close_matches(name.upper(), known, n=1)
            raise ConfigError(
                f"{name} in the environment is no setting{f': is it {near[0]}?' if near else '.'}",
                "Unset it, or write it right; `ledgerstream config` shows them all.",
            )
    return LogSettings(**({} if file is None else read_properties(Path(file))))
