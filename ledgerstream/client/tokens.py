"""Tokens for OAUTHBEARER: a fixed one, one that a callable gives, or one of an OIDC endpoint."""

from __future__ import annotations

import asyncio
import base64
import inspect
import json
import time
import urllib.error
import urllib.parse
import urllib.request
from typing import Any

from pydantic import SecretStr

from ledgerstream.client.security import Security
from ledgerstream.errors import ConfigError, LedgerStreamError, SecurityError

ANSWER_BYTES_MAX = 256 * 1024
KEPT_SHARE = 0.8  # of its life a token is used again; a session that begins then is renewed in time


class Tokens:
    """Where the tokens of one client come from. Without OAUTHBEARER nothing is ever asked."""

    def __init__(self, security: Security, limit_ms: int) -> None:
        self._security = security
        self._limit_ms = limit_ms
        self._kept: tuple[float, str] | None = None  # until when, on the loop's clock, and what

    async def next(self) -> str:
        """A token for one proof.

        Raises SecurityError where there will be none, ConnectionError or TimeoutError where there
        may be one later.
        """
        source = self._security.sasl_oauthbearer_token
        if isinstance(source, SecretStr):
            return source.get_secret_value()
        if source is None:
            return await self._by_client()
        try:
            found = source()
            token = await found if inspect.isawaitable(found) else found
        except LedgerStreamError:
            raise
        except Exception as error:  # not our code: most likely its network
            raise ConnectionError(f"sasl_oauthbearer_token gave no token: {error!r}") from error
        if not isinstance(token, str):
            raise ConfigError(
                f"sasl_oauthbearer_token gave {type(token).__name__}.", "A token is a str."
            )
        return token

    async def _by_client(self) -> str:
        now = asyncio.get_running_loop().time()
        if self._kept is not None and now < self._kept[0]:
            return self._kept[1]
        token, lifetime_s = await asyncio.to_thread(_ask, self._security, self._limit_ms / 1000)
        self._kept = now + lifetime_s * KEPT_SHARE, token
        return token


def _ask(security: Security, limit_s: float) -> tuple[str, float]:
    """(token, its lifetime in seconds), by client credentials (RFC 6749, 4.4)."""
    url, name = security.sasl_oauthbearer_token_endpoint_url, security.sasl_oauthbearer_client_id
    secret = security.sasl_oauthbearer_client_secret
    assert url is not None and name is not None and secret is not None
    who = f"{urllib.parse.quote_plus(name)}:{urllib.parse.quote_plus(secret.get_secret_value())}"
    form = {"grant_type": "client_credentials"}
    if security.sasl_oauthbearer_scope is not None:
        form["scope"] = security.sasl_oauthbearer_scope
    request = urllib.request.Request(
        url,
        urllib.parse.urlencode(form).encode(),
        {
            "Authorization": f"Basic {base64.b64encode(who.encode()).decode()}",
            "Accept": "application/json",
        },
    )
    try:
        with urllib.request.urlopen(request, timeout=limit_s) as reply:
            answer: Any = json.loads(reply.read(ANSWER_BYTES_MAX))
        token, lifetime_s = answer["access_token"], float(answer.get("expires_in", 0))
    except urllib.error.HTTPError as error:
        error.close()
        if error.code >= 500 or error.code == 429:
            raise ConnectionError(f"{url} gave no token: {error.code} {error.reason}") from None
        raise SecurityError(
            f"{url} refuses a token to client {name!r}: {error.code} {error.reason}.",
            "Check sasl_oauthbearer_client_id, _client_secret and _scope.",
        ) from None
    except OSError as error:
        raise ConnectionError(f"{url} gave no token: {error}") from error
    except (ValueError, LookupError, TypeError, AttributeError):  # the answer may hold a secret
        raise SecurityError(
            f"{url} answers, and there is no access_token in it.",
            "sasl_oauthbearer_token_endpoint_url is the token endpoint itself.",
        ) from None
    return str(token), lifetime_s if lifetime_s > 0 else _lifetime_s(str(token))


def _lifetime_s(token: str) -> float:
    """What is left of a JWT; nothing, where it does not say."""
    try:
        body = token.split(".")[1]
        claims = json.loads(base64.urlsafe_b64decode(body + "=" * (-len(body) % 4)))
        return max(float(claims["exp"]) - time.time(), 0.0)
    except (ValueError, LookupError, TypeError):
        return 0.0
