"""Settings: flags over environment over file over defaults, and errors that name the setting."""

from __future__ import annotations

from pathlib import Path

import pytest

from ledgerstream.broker.settings import load
from ledgerstream.errors import ConfigError


def test_flags_win_over_environment_over_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "broker.toml"
    file.write_text('port = 1111\nnode_id = 5\nhost = "127.0.0.2"\n')
    monkeypatch.setenv("LEDGERSTREAM_PORT", "2222")
    monkeypatch.setenv("LEDGERSTREAM_NODE_ID", "6")
    settings = load(file, port=3333, host=None)
    assert (settings.port, settings.node_id, settings.host) == (3333, 6, "127.0.0.2")
    assert settings.durability == "sync"


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        ({"port": 70000}, "port"),
        ({"durability": "maybe"}, "durability"),
        ({"no_such": 1}, "no_such"),
    ],
)
def test_a_wrong_setting_is_named(flags: dict[str, object], name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        load(None, **flags)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load(tmp_path / "absent.toml")
    bad = tmp_path / "bad.toml"
    bad.write_text("port = = 5")
    with pytest.raises(ConfigError, match="cannot be read"):
        load(bad)
