"""Who may call: bearer tokens, known by their hashes, and what each is good for."""

import hashlib
import hmac
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from http import HTTPStatus
from typing import Annotated

from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from serving.api.problems import ProblemError
from serving.settings import ApiToken, Auth

OPERATE = "operate"
INSPECT = "inspect"
FEEDBACK = "feedback"
_HELP = (
    "Send the header 'Authorization: Bearer <token>'; whoever runs the fleet makes tokens with"
    " `python -m serving.fleet token`."
)

_bearer = HTTPBearer(auto_error=False, description="A token of the fleet file.")


@dataclass(frozen=True, kw_only=True, slots=True)
class Caller:
    """Who asks: the name of the token, empty where there are no tokens at all, and its scopes."""

    name: str
    scopes: tuple[str, ...]


_ANYBODY = Caller(name="", scopes=(INSPECT, FEEDBACK, OPERATE))


class Access:
    """The tokens of this moment: they change while the fleet runs, through `allow`."""

    def __init__(self, auth: Auth) -> None:
        self._auth = auth

    def allow(self, auth: Auth) -> None:
        """These tokens and no others from now on."""
        self._auth = auth

    @property
    def needs_token(self) -> bool:
        """Whether anything is asked of callers."""
        return bool(self._auth.tokens)

    def check(self, token: str | None, *scopes: str) -> Caller:
        """Who has this token.

        ProblemError unless it is known and has one of `scopes`, any if none are given. Where there
        are no tokens at all, everything passes.
        """
        if not self.needs_token:
            return _ANYBODY
        if token is None:
            raise _unauthorized("the request carries no token", "Bearer")
        digest = hashlib.sha256(token.encode()).hexdigest()
        known: ApiToken | None = None
        for candidate in self._auth.tokens:  # all of them, so that the time taken tells nothing
            if hmac.compare_digest(digest, candidate.sha256):
                known = candidate
        if known is None:
            raise _unauthorized("the token is not known here", 'Bearer error="invalid_token"')
        if scopes and not set(scopes) & set(known.scopes):
            raise ProblemError(
                HTTPStatus.FORBIDDEN,
                "Forbidden",
                f"the token of {known.name} has the scopes {', '.join(known.scopes)}; this needs"
                f" {' or '.join(scopes)}",
                "Use another token, or add the scope to this one in the fleet file and deploy.",
            )
        return Caller(name=known.name, scopes=known.scopes)


def require(access: Access, *scopes: str) -> Callable[..., Awaitable[Caller]]:
    """A dependency that lets a request pass only with a token of one of these scopes, of any if
    none are given, and says whose it is.

    With `inspect` or `feedback`, the routes of a category are also open to `inspect:<category>` or
    `feedback:<category>`.
    """

    async def check(
        request: Request,
        credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)],
    ) -> Caller:
        category = request.path_params.get("category")
        of_category = [
            f"{scope}:{category}" for scope in scopes if category and scope in (INSPECT, FEEDBACK)
        ]
        return access.check(credentials.credentials if credentials else None, *scopes, *of_category)

    return check


def _unauthorized(detail: str, challenge: str) -> ProblemError:
    return ProblemError(
        HTTPStatus.UNAUTHORIZED,
        "Unauthorized",
        detail,
        _HELP,
        headers={"WWW-Authenticate": challenge},
    )
