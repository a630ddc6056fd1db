"""Client of balena-engine's HTTP API: pull, delta, save, remove. All calls block, in their own
threads.

Source: Docker Engine API; balena-engine's ``POST /images/delta?src=&dest=&t=``. It answers with a
stream of JSON objects like those of a pull, and reports ``Created delta: sha256:…`` in one of the
last. Errors in the middle of such a stream come with status 200, as objects with ``error``.
"""

from __future__ import annotations

import errno
import json
import re
import tarfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import docker
import requests
import urllib3
from docker.auth import encode_header
from docker.tls import TLSConfig

from obdelta.builds.engine.saved_image import SavedImage, Watch, unpack
from obdelta.errors import EngineFailed, EngineUnavailable, StoreFull
from obdelta.oci import Digest, Reference
from obdelta.registry import Credentials

IDLE = 120.0
"""Seconds without a byte after which an engine counts as unavailable; it reports progress several
times a second.
"""
_API = "1.35"
"""The version that the first balena-engine (17.12) and every later one speaks."""
_BROKE_OFF = (
    requests.exceptions.ChunkedEncodingError,
    requests.exceptions.ReadTimeout,
    urllib3.exceptions.ProtocolError,
    urllib3.exceptions.ReadTimeoutError,
)
_CREATED = re.compile(r"Created delta: (sha256:[0-9a-f]{64})", re.ASCII)
_PATH = re.compile(r"(?<![\w.:/-])/[^\s:]+:?")
_MAX_MESSAGE = 300


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """TLS files for an engine, all PEM: its authority, and our certificate and key."""

    ca: Path
    certificate: Path
    key: Path

    @classmethod
    def of(cls, folder: Path) -> TlsFiles:
        """Returns the files of a directory, named as in Docker's ``DOCKER_CERT_PATH``."""
        return cls(folder / "ca.pem", folder / "cert.pem", folder / "key.pem")


class EngineApi:
    """Calls an engine at ``unix://…`` or ``tcp://host:port``, from any thread.

    Every method raises EngineUnavailable and EngineFailed.
    """

    def __init__(self, url: str, tls: TlsFiles | None = None, *, idle: float = IDLE) -> None:
        self._url, self._tls, self._idle = url, tls, idle

    @contextmanager
    def _client(self) -> Iterator[docker.APIClient]:
        """Yields a client for one call: no connection is kept that a restarted engine would have
        closed.
        """
        try:
            tls: TLSConfig | bool = False
            if self._tls is not None:
                tls = TLSConfig(
                    client_cert=(str(self._tls.certificate), str(self._tls.key)),
                    ca_cert=str(self._tls.ca),
                    verify=True,
                )
            client = docker.APIClient(
                base_url=self._url, version=_API, timeout=int(self._idle), tls=tls
            )
            # Otherwise requests lets REQUESTS_CA_BUNDLE override our authority, and uses
            # HTTPS_PROXY.
            client.trust_env = False
            try:
                yield client
            finally:
                client.close()
        except docker.errors.APIError as error:
            raise EngineFailed(_line(error.explanation or str(error))) from error
        except requests.exceptions.ConnectionError as error:
            # The error that requests raises for silence in the middle of an answer.
            if error.args and isinstance(error.args[0], urllib3.exceptions.ReadTimeoutError):
                raise EngineFailed("its answer broke off") from error
            raise EngineUnavailable(f"{type(error).__name__}") from error
        except _BROKE_OFF as error:
            # Not "unavailable": an engine that breaks down over these images would be retried for
            # ever.
            raise EngineFailed("its answer broke off") from error
        except (
            docker.errors.DockerException,
            requests.RequestException,
            urllib3.exceptions.HTTPError,
            OSError,
        ) as error:
            # Our own disk.
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise StoreFull("no space left") from error
            raise EngineUnavailable(f"{type(error).__name__}") from error

    def version(self) -> str:
        """Returns the engine's version."""
        with self._client() as client:
            return str(client.version().get("Version", ""))

    def image_id(self, name: str) -> Digest | None:
        """Returns the ID of an image, by name or by ID; None if the engine has no such image."""
        with self._client() as client:
            try:
                return Digest.parse(client.inspect_image(name)["Id"])  # type: ignore[no-untyped-call] # the SDK's
            except docker.errors.ImageNotFound:
                return None

    def pull(self, reference: Reference, credentials: Credentials, watch: Watch) -> None:
        """Pulls an image by its digest."""
        with self._client() as client:
            # Not the SDK's pull: it waits without end for an engine that has fallen silent.
            response = client.post(
                f"{client.base_url}/v{client.api_version}/images/create",
                params={
                    "fromImage": f"{reference.host}/{reference.repository}",
                    "tag": str(reference.digest),
                },
                headers={"X-Registry-Auth": encode_header(_auth(reference.host, credentials))},
                stream=True,
                timeout=self._idle,
            )
            with _opened(response):
                for _ in _checked(_objects(response), watch, "pull"):
                    pass

    def create_delta(self, base: Digest, target: Digest, tag: str, watch: Watch) -> Digest:
        """Makes the engine create the delta image between two of its images, with the tag ``tag``.
        Returns its ID.
        """
        with self._client() as client:
            response = client.post(
                f"{client.base_url}/v{client.api_version}/images/delta",
                params={"src": str(base), "dest": str(target), "t": tag},
                stream=True,
                timeout=self._idle,
            )
            with _opened(response):
                created = None
                for step in _checked(_objects(response), watch, "delta"):
                    match = _CREATED.match(str(step.get("status", "")))
                    created = match[1] if match is not None else created
                if created is None:
                    raise EngineFailed("it ended without a delta")
                return Digest.parse(created)

    def save(self, image: Digest, stem: Path, limit: int, watch: Watch) -> SavedImage:
        """Saves an image's config and layers in files whose names begin with ``stem``; the caller
        removes them.

        Raises EngineFailed for more than ``limit`` bytes.
        """
        with self._client() as client:
            response = client.get(
                f"{client.base_url}/v{client.api_version}/images/{image}/get",
                stream=True,
                timeout=self._idle,
            )
            with _opened(response):
                try:
                    return unpack(cast(Any, response.raw), stem, limit, watch)
                except tarfile.TarError as error:
                    raise EngineFailed("the saved image is an incomplete tar") from error

    def remove(self, name: str) -> None:
        """Removes a name, and with an image's last name the image. A missing name is no error."""
        with self._client() as client:
            try:
                client.remove_image(name)
            except docker.errors.ImageNotFound:
                return


def _auth(host: str, credentials: Credentials) -> dict[str, str]:
    """Returns the value of ``X-Registry-Auth``."""
    if credentials.kind == "bearer":
        return {"registrytoken": credentials.secret}
    if credentials.kind == "basic":
        return {"username": credentials.user, "password": credentials.secret, "serveraddress": host}
    return {}


@contextmanager
def _opened(response: requests.Response) -> Iterator[None]:
    """Closes a response at the end. Raises EngineFailed for any status but 200."""
    try:
        if response.status_code != 200:
            message = _message(response.text) or f"it answered {response.status_code}"
            if message == "page not found":  # of an engine without balena's endpoint
                message = "it makes no deltas; is it Docker's?"
            raise EngineFailed(message)
        yield
    finally:
        response.close()


def _objects(response: requests.Response) -> Iterator[dict[str, Any]]:
    for line in response.iter_lines(chunk_size=4096):
        if line:
            try:
                value = json.loads(line)
            except ValueError as error:
                raise EngineFailed("its answer broke off") from error
            if isinstance(value, dict):
                yield value


def _checked(
    stream: Iterable[dict[str, Any]], watch: Watch, stage: str
) -> Iterator[dict[str, Any]]:
    """Yields the stream's objects and reports progress. Raises EngineFailed for an error in the
    stream.
    """
    for step in stream:
        watch.check()
        if step.get("error") or step.get("errorDetail"):
            detail = step.get("errorDetail")
            message = step.get("error") or (
                detail.get("message") if isinstance(detail, dict) else detail
            )
            raise EngineFailed(_line(str(message)))
        detail = step.get("progressDetail")
        if isinstance(detail, dict) and isinstance(detail.get("current"), int):
            watch.progress(
                {
                    "stage": f"engine {stage}",
                    "done": detail["current"],
                    "of": detail.get("total") or detail["current"],
                }
            )
        yield step


def _message(body: str) -> str:
    try:
        value = json.loads(body)
    except ValueError:
        return ""
    return _line(str(value.get("message", ""))) if isinstance(value, dict) else ""


def _line(text: str) -> str:
    """Returns text fit for a log and a client: one short printable line without paths of the
    engine's machine.
    """
    printed = "".join(character if character.isprintable() else " " for character in text)
    return _PATH.sub("…", " ".join(printed.split()))[:_MAX_MESSAGE]
