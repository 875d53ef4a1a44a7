"""The door to the MLflow server: its client, and errors that come within seconds."""

import logging
import os
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit, urlunsplit
from urllib.request import urlopen

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException, RestException
from mlflow.utils.credentials import get_default_host_creds
from mlflow.utils.rest_utils import http_request, verify_rest_response
from requests.exceptions import RequestException

from apt_ray.errors import RegistryError, RegistryUnavailableError

_PROBE_SECONDS = 5.0
_ANSWER_SECONDS = 30.0


class Connection:
    """An MLflow server.

    Args:
        tracking_uri: its address; None reads MLFLOW_TRACKING_URI.

    Attributes:
        address: the same without credentials, fit for messages.
        client: MLflow's client of it; use it inside `requests()`.
    """

    def __init__(self, tracking_uri: str | None) -> None:
        uri = (tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or "").rstrip("/")
        if not uri.startswith(("http://", "https://")):
            raise RegistryError(
                f"{uri!r} is not the address of an MLflow server: pass one, or set"
                " MLFLOW_TRACKING_URI, for example to http://127.0.0.1:5000"
                if uri
                else "no registry is named: pass the address of the MLflow server, or set"
                " MLFLOW_TRACKING_URI, for example to http://127.0.0.1:5000"
            )
        _set_up_mlflow()
        self.uri = uri
        self.address = _without_credentials(uri)
        self.client = MlflowClient(tracking_uri=uri, registry_uri=uri)

    @contextmanager
    def requests(self) -> Iterator[MlflowClient]:
        """Fail within seconds where MLflow's own retries would take minutes."""
        self._probe()
        try:
            yield self.client
        except MlflowException as error:
            raise self._refusal(error) from error

    def get(self, endpoint: str, parameters: dict[str, str]) -> Any:
        """The JSON of one GET request, without retries.

        It spares the caller CPU time: MLflow's client takes 0.35 s to list a thousand models, this
        0.05 s (docs/registry.md).
        """
        try:
            response = http_request(
                get_default_host_creds(self.uri),
                endpoint,
                "GET",
                params=parameters,
                max_retries=0,
                timeout=_ANSWER_SECONDS,
                raise_on_status=False,
            )
            return verify_rest_response(response, endpoint).json()
        except MlflowException as error:
            cause: BaseException | None = error
            while cause is not None:
                if isinstance(cause, RequestException):
                    raise self._unavailable(type(cause).__name__) from None
                cause = cause.__cause__ or cause.__context__
            raise self._refusal(error) from error

    def redacted(self, error: Exception) -> str:
        """The error's message without the credentials that the address may hold."""
        return str(error).replace(self.uri, self.address)

    def _refusal(self, error: MlflowException) -> RegistryError:
        # MLflow refuses in JSON; whatever else a server says, its client quotes as a body.
        said = self.redacted(error)
        reason, _, foreign = said.partition(". Response body: ")
        if foreign and not isinstance(error, RestException):
            return RegistryError(
                f"what answers at {self.address} does not speak as an MLflow server ({reason}):"
                " correct the address (MLFLOW_TRACKING_URI), or what stands before the server"
            )
        return RegistryError(f"the registry at {self.address} refused: {said}")

    def _probe(self) -> None:
        try:
            urlopen(f"{self.address}/health", timeout=_PROBE_SECONDS).close()
        except HTTPError:
            pass  # It answers; whether the request is allowed is for MLflow's client to find out.
        except (OSError, HTTPException) as error:
            reason = error.reason if isinstance(error, URLError) else error
            if isinstance(reason, ssl.SSLError):
                return  # It answers; MLflow's client has its own settings for certificates.
            raise self._unavailable(reason) from None

    def _unavailable(self, reason: object) -> RegistryUnavailableError:
        return RegistryUnavailableError(
            f"no MLflow server answers at {self.address} ({reason}): start one with "
            "`mlflow server`, or correct the address (MLFLOW_TRACKING_URI)"
        )


def _set_up_mlflow() -> None:
    """Settings of MLflow's that nobody has made otherwise.

    It prints a bar per file and an address per run, which drowns a job's log; and it asks a server
    that refuses eight times over four minutes.
    """
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    logging.getLogger("mlflow.store.model_registry").setLevel(logging.WARNING)


def _without_credentials(uri: str) -> str:
    parts = urlsplit(uri)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
