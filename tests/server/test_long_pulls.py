"""Pulls that outlive their token: the requests that an expired token may still make, and those
that it may not.

The server, its registry and its tokens are real. Only the end of the 24 hours, for which no test
can wait, is tested inside the process.
"""

from __future__ import annotations

import base64
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest
import pytest_twisted
from twisted.internet.defer import Deferred
from twisted.web.http import Request

from obdelta.concurrency.limits import Limit
from obdelta.device.http import Http
from obdelta.errors import Denied, Unauthorized
from obdelta.net.client_address import ForwardedClients
from obdelta.oci import Digest, Reference
from obdelta.oci.manifest import ACCEPT
from obdelta.store.catalogue.catalogue import Catalogue
from obdelta.store.catalogue.database import Database
from obdelta.store.catalogue.tables.device_pulls import MAX_PER_SUBJECT, StartedPull, note_pulls
from obdelta.web.devices.access.admission import Admission, PullGrace
from obdelta.web.devices.access.token_verifier import LEEWAY
from obdelta.web.devices.stored_content import StoredContent
from tests.support.auth_attacks import BASE, NOW, OURS, TARGET, access_for, good
from tests.support.images import BASE_REPOSITORY, TARGET_REPOSITORY
from tests.support.logs import logged
from tests.support.processes import until
from tests.support.server import RunningServer
from tests.support.stack import Stack, stack
from tests.support.tokens import Issuer, pulls
from tests.support.web import reactor

__all__ = ["stack"]

VALID_SECONDS = 8
"""Seconds for which the tokens are still accepted: enough to fetch a manifest on a busy machine."""


@dataclass
class Pull:
    """A delta in a server's registry, fetched by a device with a token."""

    stack: Stack
    server: RunningServer
    name: Reference

    def get(
        self, path: str, token: str, *, method: str = "GET", byte_range: str | None = None
    ) -> tuple[int, bytes]:
        headers = {"Authorization": f"Bearer {token}", "Accept": ", ".join(ACCEPT)}
        if byte_range is not None:
            headers["Range"] = byte_range
        url = f"{self.server.url}/v2/{self.name.repository}/{path}"
        with Http(timeout=60).request(method, url, headers) as answer:
            return answer.status, b"" if method == "HEAD" else b"".join(answer.chunks())

    def status(
        self, path: str, token: str, *, method: str = "GET", byte_range: str | None = None
    ) -> int:
        return self.get(path, token, method=method, byte_range=byte_range)[0]


def token_that_ends(issuer: Issuer, exp: float, *repositories: str, **more: Any) -> str:
    return issuer.token(
        pulls(*(repositories or (BASE_REPOSITORY, TARGET_REPOSITORY))), exp=exp, **more
    )


def forged(token: str) -> str:
    """Returns the same token with a later expiry and the old signature."""
    header, payload, signature = token.split(".")
    claims = json.loads(base64.urlsafe_b64decode(payload + "=="))
    changed = json.dumps({**claims, "exp": claims["exp"] + 10**6}).encode()
    return f"{header}.{base64.urlsafe_b64encode(changed).rstrip(b'=').decode()}.{signature}"


@pytest.mark.parametrize("processes", ["1", "3"])
def test_an_expired_token_ends_its_own_pull_and_nothing_else(stack: Stack, processes: str) -> None:
    state = f"state-{processes}"
    with stack.server(state, processes=processes) as server:
        pull = Pull(stack, server, Reference.parse(stack.name(server)))
        exp = time.time() - LEEWAY + VALID_SECONDS
        mine = token_that_ends(stack.issuer, exp)
        another = token_that_ends(stack.issuer, exp)
        stranger = token_that_ends(stack.issuer, exp, subject="d_another")
        unnamed = token_that_ends(stack.issuer, exp, subject=...)
        only_looked = token_that_ends(stack.issuer, exp, subject="d_looked")
        target_only = token_that_ends(stack.issuer, exp, TARGET_REPOSITORY, subject="d_target")
        manifest = f"manifests/{pull.name.tag}"
        status, body = pull.get(manifest, mine)
        assert status == 200
        assert pull.status(manifest, unnamed) == 200
        assert pull.status(manifest, only_looked, method="HEAD") == 200
        assert pull.status(manifest, target_only) == 403
        until("the tokens have expired", lambda: pull.status(manifest, mine) == 401)
        found = json.loads(body)
        blobs = [f"blobs/{part['digest']}" for part in (found["config"], *found["layers"])]
        target = json.loads(stack.pair.target.manifest)
        other_blob = f"blobs/{target['layers'][-1]['digest']}"

        for blob in blobs:
            for _ in range(4):  # with several processes, each of them
                assert pull.status(blob, mine) == 200
            assert pull.status(blob, mine, method="HEAD") == 200
            assert pull.status(blob, mine, byte_range="bytes=5-") == 206
            for refused in (another, stranger, unnamed, only_looked, target_only, forged(mine)):
                assert pull.status(blob, refused) == 401
            assert (
                pull.status(
                    blob, Issuer().token(pulls(BASE_REPOSITORY, TARGET_REPOSITORY), exp=exp)
                )
                == 401
            )
        for path in (
            other_blob,
            f"blobs/sha256:{'0' * 64}",
            manifest,
            f"manifests/{Digest.of(body)}",
            "tags/list",
        ):
            assert pull.status(path, mine) == 401
        pull.name = Reference("", BASE_REPOSITORY)
        assert pull.status(blobs[-1], mine) == 401
        question = f"{server.url}/api/v3/delta?src={stack.names()[0]}&dest={stack.names()[1]}"
        for url in (question, f"{server.url}/v2/"):
            with Http(timeout=60).request(
                "GET", url, {"Authorization": f"Bearer {mine}"}
            ) as answer:
                assert answer.status == 401

    name = Reference("", TARGET_REPOSITORY)
    with stack.server(state, processes=processes) as server:
        assert Pull(stack, server, name).status(blobs[-1], mine) == 200, (
            "a restart does not end a pull"
        )
        assert Pull(stack, server, name).status(blobs[-1], another) == 401
        assert mine not in server.log
    with stack.server(state, processes=processes, pull_grace="0") as server:
        assert Pull(stack, server, name).status(blobs[-1], mine) == 401, "it is off"
    rotated = stack.root / f"rotated-{processes}"
    rotated.mkdir()
    with stack.server(state, processes=processes, auth_key=str(Issuer().write(rotated))) as server:
        assert Pull(stack, server, name).status(blobs[-1], mine) == 401, "another key signs"
    assert mine.encode() not in (stack.root / state / "catalogue.sqlite").read_bytes()


def test_a_rotated_key_ends_the_remembered_access(stack: Stack, tmp_path: Path) -> None:
    issuer = Issuer()
    keys = tmp_path / "keys.pem"
    keys.write_bytes(issuer.certificate)
    with stack.server("state-rotation", auth_key=str(keys)) as server:
        exp = time.time() - LEEWAY + VALID_SECONDS
        mine, fresh = (
            token_that_ends(issuer, exp),
            issuer.token(pulls(BASE_REPOSITORY, TARGET_REPOSITORY)),
        )
        source, wanted = stack.names()
        question = f"{server.url}/api/v3/delta?src={source}&dest={wanted}&wait=true"
        with Http(timeout=60).request(
            "GET", question, {"Authorization": f"Bearer {fresh}"}
        ) as answer:
            name = Reference.parse(json.loads(b"".join(answer.chunks()))["name"])
        exp = time.time() - LEEWAY + VALID_SECONDS
        mine = token_that_ends(issuer, exp)
        pull = Pull(stack, server, name)
        status, body = pull.get(f"manifests/{name.tag}", mine)
        assert status == 200
        until("it has expired", lambda: pull.status(f"manifests/{name.tag}", mine) == 401)
        blob = f"blobs/{json.loads(body)['layers'][-1]['digest']}"
        assert pull.status(blob, mine) == 200
        keys.write_bytes(Issuer().certificate)
        until("the new key is read", lambda: pull.status(blob, mine) == 401)


# -- from inside, where time can pass ----------------------------------------------------------


class BlobRequest:
    """A double of a request with the parts that admission reads."""

    def __init__(self, token: str) -> None:
        self._token = token

    def getHeader(self, name: bytes) -> bytes | None:
        return f"Bearer {self._token}".encode() if name == b"authorization" else None

    def notifyFinish(self) -> Deferred[None]:
        return Deferred()


def blob_request(token: str) -> Request:
    return cast(Request, BlobRequest(token))


MANIFEST, LAYER, FOREIGN = Digest.of(b"manifest"), Digest.of(b"layer"), Digest.of(b"foreign")


@asynccontextmanager
async def admission(
    path: Path, clock: list[float], grace: float = 86400
) -> AsyncIterator[tuple[Admission, Catalogue]]:
    catalogue = await Catalogue.open(path / "catalogue.sqlite", reactor)
    database: Database = catalogue._database
    await database.write(
        lambda connection: connection.execute(
            "INSERT OR IGNORE INTO manifests VALUES (?, 'x', x'00')", (MANIFEST.hex,)
        )
    )
    await database.write(
        lambda connection: connection.execute(
            "INSERT OR IGNORE INTO blobs VALUES (?, 1, 0)", (LAYER.hex,)
        )
    )
    await database.write(
        lambda connection: connection.execute(
            "INSERT OR IGNORE INTO manifest_blobs VALUES (?, ?, 'x')", (MANIFEST.hex, LAYER.hex)
        )
    )
    access = access_for(OURS, now=lambda: clock[0])
    admitted = Admission(
        access,
        Limit(0, "requests"),
        ForwardedClients(None),
        PullGrace(catalogue.started_pulls, grace, lambda: clock[0]),
    )
    try:
        yield admitted, catalogue
    finally:
        await catalogue.close()


async def begin(admitted: Admission, catalogue: Catalogue, token: str, now: float) -> None:
    request = blob_request(token)
    admitted.admit(request, [TARGET])
    await catalogue.counters.served(MANIFEST, int(now), admitted.started_pull(request, TARGET))


@pytest_twisted.ensureDeferred
async def test_remembered_access_ends_after_a_day(tmp_path: Path) -> None:
    clock = [NOW]
    async with admission(tmp_path, clock) as (admitted, catalogue):
        token, exp = good(exp=NOW + 100), NOW + 100
        await begin(admitted, catalogue, token, NOW)
        for clock[0], allowed in (
            (exp + LEEWAY - 1, True),
            (exp + LEEWAY, True),
            (exp + 86399, True),
            (exp + 86400, False),
            (exp + 10**6, False),
            (exp + 1000, True),
        ):
            request = blob_request(token)
            if not allowed:
                with pytest.raises(Unauthorized, match="expired"):
                    await admitted.admit_blob(request, TARGET, LAYER)
                continue
            grant = await admitted.admit_blob(request, TARGET, LAYER)
            assert grant.allows(TARGET)
            admitted.require_pull(request, [TARGET, BASE])
            with pytest.raises(Denied):
                admitted.require_pull(request, ["v2/" + "c" * 32])
        for digest, repository in ((FOREIGN, TARGET), (MANIFEST, TARGET), (LAYER, BASE)):
            with pytest.raises(Unauthorized):
                await admitted.admit_blob(blob_request(token), repository, digest)
        # An expired token begins no pull, not even with the manifest that it fetched before.
        assert admitted.started_pull(blob_request(token), TARGET) is None


@pytest_twisted.ensureDeferred
async def test_a_token_of_the_future_or_of_another_device_is_still_refused(
    tmp_path: Path,
) -> None:
    clock = [NOW]
    async with admission(tmp_path, clock) as (admitted, catalogue):
        await begin(admitted, catalogue, good(exp=NOW + 100), NOW)
        clock[0] = NOW + 1000
        for token in (
            good(exp=NOW + 100, subject="d_other"),
            good(exp=NOW + 100, iss="api.other.example"),
            good(exp=NOW + 100, aud="other.example"),
            good(exp=NOW + 100, nbf=NOW + 5000),
            good(exp=...),
            good(exp=float("nan")),
            Issuer().token(pulls(BASE, TARGET), exp=NOW + 100),
        ):
            with pytest.raises(Unauthorized):
                await admitted.admit_blob(blob_request(token), TARGET, LAYER)


@pytest_twisted.ensureDeferred
async def test_remembered_access_is_bounded_for_each_subject_and_expires(tmp_path: Path) -> None:
    catalogue = await Catalogue.open(tmp_path / "catalogue.sqlite", reactor)

    def count(subject: str) -> int:
        return len({token for token in range(200) if f"{subject}{token}" in tokens})

    def pull(subject: str, number: int, until_: int) -> tuple[Digest, StartedPull]:
        return MANIFEST, StartedPull(f"{subject}{number}", subject, TARGET, until_)

    await catalogue._database.write(
        lambda connection: note_pulls(connection, [pull("quiet", 0, 5000), pull("old", 0, 900)])
    )
    for number in range(100):
        await catalogue.counters.served(MANIFEST, 1000, pull("busy", number, 2000 + number)[1])
    assert (await catalogue.expire(1000, 60))["started_pulls"] == 1
    rows = await catalogue._database.read(
        lambda connection: connection.execute("SELECT token FROM started_pulls").fetchall()
    )
    tokens = {token for (token,) in rows}
    assert (
        count("busy") == MAX_PER_SUBJECT
        and "busy99" in tokens
        and "quiet0" in tokens
        and "old0" not in tokens
    )
    await catalogue.close()


@pytest_twisted.ensureDeferred
async def test_a_failed_write_of_remembered_access_does_not_fail_the_manifest(
    tmp_path: Path,
) -> None:
    catalogue = await Catalogue.open(tmp_path / "catalogue.sqlite", reactor)
    nothing: Any = None  # no file and no access is checked here
    content = StoredContent(
        catalogue=catalogue,
        blobs=nothing,
        admission=nothing,
        times=nothing,
        now=lambda: float(NOW),
    )
    with logged("critical") as lines:
        await content.record_served(MANIFEST, StartedPull("\ud800", "d_1", TARGET, int(NOW)))
    assert lines == [f"the use of {MANIFEST} was not recorded"]
    await catalogue.close()
