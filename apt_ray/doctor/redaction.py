"""Takes secrets out of text that somebody else will read.

First the secrets that can be known here, by their value, wherever they stand; then what looks like
one. In the place of each stands a mark of a few hexadecimal digits, equal for equal secrets, so
that it can still be seen where the same one was used.
"""

import hashlib
import os
import re
from base64 import b64encode
from collections.abc import Iterable, Iterator
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

from apt_ray.machine import expanded

_SECRET_NAME = (
    r"(?:secret|token(?!s\b)|passw(?:or)?d|passphrase|credential|api[_-]?key|access[_-]?key|sha256"
    r"|authorization|cookie|signature)"
)
_NAMED = re.compile(_SECRET_NAME, re.IGNORECASE)
_SHORTEST = 6
# Where other tools keep secrets in this user's home.
_FILES = (
    "~/.ray/auth_token",
    "~/.aws/credentials",
    "~/.mlflow/credentials",
    "~/.netrc",
    "~/.pgpass",
)

_PATTERNS = (
    re.compile(
        r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.DOTALL
    ),
    re.compile(r"(?i)(?<=bearer )[^\s\"',;]+"),
    re.compile(r"(?i)(?<=basic )[A-Za-z0-9+/=_-]{8,}"),
    re.compile(r"(?<=://)[^\s/@\"']+(?=@)"),  # user and password of an address
    re.compile(r"\b(?:AKIA|ASIA|AROA|AIDA)[A-Z0-9]{12,}\b"),
    re.compile(r"\beyJ[\w-]+\.[\w-]+\.[\w-]*"),  # a JSON web token
    re.compile(r"\b(?:hf|ghp|gho|ghs|github_pat|glpat|xox[abp]|sk|dapi)[_-]?[A-Za-z0-9_-]{16,}\b"),
    # `name = value`, `"name": "value"`, `name=value&`, `--name value`
    re.compile(
        rf"(?i)(?<![\w-])[\w.-]*{_SECRET_NAME}[\w.-]*[\"']?(?:\s*[:=]\s*|\s+(?=[\"'\w]))"
        r"(?P<value>\"[^\"\n]*\"|'[^'\n]*'|[^\s,;&}\]\"']+)"
    ),
    re.compile(r"(?<![0-9A-Fa-f])[0-9A-Fa-f]{64}(?![0-9A-Fa-f])"),  # Ray's token, or a digest
    # What `serving.fleet token` and most others make: long, and of all kinds of letters.
    re.compile(
        r"(?<![\w/+-])(?=[\w/+-]*[a-z])(?=[\w/+-]*[A-Z])(?=[\w/+-]*\d)[\w+/-]{40,}={0,2}(?![\w/+-])"
    ),
)


class Redactor:
    """Replaces secrets.

    Args:
        known: further secrets, beside those of this process's environment and this user's files.
    """

    def __init__(self, known: Iterable[str] = ()) -> None:
        forms: set[str] = set()
        for secret in {*_known(), *known}:
            if len(secret) >= _SHORTEST:
                forms |= {secret, quote(secret, safe=""), repr(secret)[1:-1]}
                forms.add(b64encode(secret.encode("utf-8", "surrogateescape")).decode())
        longest_first = sorted(forms, key=len, reverse=True)
        self._known = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    def __call__(self, text: str) -> str:
        """The text without secrets."""
        text = self._known.sub(lambda found: _mark(found[0]), text)
        for pattern in _PATTERNS:
            text = pattern.sub(_replaced, text)
        return text

    def value(self, name: str, value: str) -> str:
        """The value of a setting or variable of this name."""
        return _mark(value) if value and is_secret(name) else self(value)


def is_secret(name: str) -> bool:
    """Whether what has this name is likely to be a secret; a path to one is none."""
    return bool(_NAMED.search(name)) and not name.upper().endswith(("_PATH", "_FILE"))


def _replaced(found: re.Match[str]) -> str:
    if "value" not in found.re.groupindex:
        return _mark(found[0])
    value = found["value"]
    bare = value.strip("\"'")
    if not bare or bare.startswith("[redacted") or bare in ("null", "true", "false", "None"):
        return found[0]
    begin = found.start("value") - found.start()
    return found[0][:begin] + value.replace(bare, _mark(bare))


def _mark(secret: str) -> str:
    return f"[redacted {hashlib.sha256(secret.encode('utf-8', 'replace')).hexdigest()[:4]}]"


def _known() -> Iterator[str]:
    """The secrets that stand in this environment and in this user's files."""
    environment = os.environ
    for name, value in environment.items():
        if is_secret(name):
            yield value.strip()
        if "@" in value and "://" in value:
            yield from _of_address(value)
    user, password = (
        environment.get(f"MLFLOW_TRACKING_{name}", "") for name in ("USERNAME", "PASSWORD")
    )
    yield b64encode(f"{user}:{password}".encode("utf-8", "surrogateescape")).decode()
    paths = [environment.get("RAY_AUTH_TOKEN_PATH"), environment.get("AWS_SHARED_CREDENTIALS_FILE")]
    for path in filter(None, [*paths, *_FILES]):
        try:
            text = expanded(Path(path)).read_text(errors="replace")
        except OSError:
            continue
        # One token alone, or settings whose values are secrets.
        for line in text.splitlines():
            yield re.split(r"[=:]", line, maxsplit=1)[-1].strip()
            yield from (word for word in line.split() if len(word) >= 2 * _SHORTEST)


def _of_address(address: str) -> Iterator[str]:
    try:
        parts = urlsplit(address)
    except ValueError:
        return
    if parts.password:
        yield from (parts.password, unquote(parts.password))
