"""Pulls images as balena-engine does: the same requests in the same order, and the same checks.

Measured order: ``GET /v2/``, ``HEAD`` of the manifest by name, ``GET`` of it by digest, the config,
then the layers one after another. The token is sent only after a ping that was answered 401 with a
Bearer challenge.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from obdelta import __version__
from obdelta.device.http import Dropped, Http, ServerFault
from obdelta.errors import BadDigest, DigestMismatch, ManifestInvalid, SizeMismatch
from obdelta.oci.config import ImageConfig, parse_config
from obdelta.oci.digest import Digest
from obdelta.oci.form import Form
from obdelta.oci.manifest import (
    ACCEPT,
    MAX_CONFIG,
    MAX_MANIFEST,
    Descriptor,
    Index,
    Manifest,
    parse_manifest,
)
from obdelta.oci.reference import Reference

PING_TIMEOUT = 15.0
"""Seconds that an engine gives the ping."""
MANIFEST_TIMEOUT = 1000.0
"""Seconds that an engine was seen to wait for a manifest that a server holds back."""
AGENTS = {form: f"balenaEngine/{form.traits.engine} obdelta/{__version__}" for form in Form}
"""The ``User-Agent`` of an engine, by the best form that the engine reads."""
_RESUMES = 5


@dataclass(frozen=True, slots=True)
class PulledImage:
    """An image whose manifest and config were pulled and verified. Its layers are still at the
    registry.
    """

    reference: Reference
    manifest: Manifest
    config: ImageConfig

    @property
    def small_bytes(self) -> int:
        """Returns the bytes of manifest and config."""
        return len(self.manifest.raw) + len(self.config.raw)


@dataclass(slots=True)
class Engine:
    """A device's engine as a registry client.

    ``registry``, if given, is the URL for all images. Otherwise each image comes from the host
    in its name, by HTTPS. For ``localhost`` and ``127.…`` that is HTTP, as with Docker.
    """

    http: Http
    token: str | None = field(default=None, repr=False)
    registry: str | None = None
    platform: str | None = None
    _pinged: dict[str, bool] = field(default_factory=dict, init=False)

    def pull(self, reference: Reference) -> PulledImage:
        """Returns manifest and config. An index gives the image for
        ``platform``, or its only one.
        """
        base = self._base(reference)
        manifest = self._manifest(base, reference)
        raw = self._config(base, reference.repository, manifest.config)
        config = parse_config(raw)
        if len(config.diff_ids) != len(manifest.layers):
            raise ManifestInvalid(
                f"image {reference}",
                f"{len(manifest.layers)} layers, but {len(config.diff_ids)} diff_ids",
            )
        return PulledImage(reference, manifest, config)

    def download(
        self,
        image: PulledImage,
        layer: Descriptor,
        out: Path,
        received: Callable[[int], None] = lambda _: None,
    ) -> None:
        """Downloads one blob to the file ``out``, and verifies size and digest. A dropped
        connection is resumed by Range. ``received`` gets each piece's bytes.
        """
        base = self._base(image.reference)
        sha256, offset, drops = hashlib.sha256(), 0, 0
        with out.open("wb") as file:
            while offset < layer.size:
                try:
                    for chunk in self._blob(base, image.reference.repository, layer, offset):
                        sha256.update(chunk)
                        file.write(chunk)
                        offset += len(chunk)
                        received(len(chunk))
                except Dropped:
                    drops += 1
                    if drops > _RESUMES:
                        raise
                    continue
                if offset != layer.size:
                    raise SizeMismatch(layer.size, offset, f"blob {layer.digest}")
        if sha256.hexdigest() != layer.digest.hex:
            raise DigestMismatch(layer.digest, f"sha256:{sha256.hexdigest()}", "blob")

    def _base(self, reference: Reference) -> str:
        if self.registry is not None:
            return self.registry.rstrip("/")
        name = reference.host.partition(":")[0]
        plain = name == "localhost" or name.startswith("127.")
        return f"{'http' if plain else 'https'}://{reference.host}"

    def _authorization(self, base: str) -> str | None:
        if base not in self._pinged:
            with self.http.request("GET", f"{base}/v2/", timeout=PING_TIMEOUT) as answer:
                challenge = answer.headers.get("www-authenticate", "")
                if answer.status != 200 and not (
                    answer.status == 401 and challenge.lower().startswith("bearer ")
                ):
                    raise answer.fault()
                self._pinged[base] = answer.status == 401
        return f"Bearer {self.token}" if self.token is not None and self._pinged[base] else None

    def _manifest(self, base: str, reference: Reference) -> Manifest:
        digest, media_type, length = self._head(base, reference)
        raw, got = self._get_manifest(base, reference.repository, digest)
        if got != media_type or len(raw) != length:
            raise ServerFault(
                f"manifest {digest}",
                f"HEAD returned {length} bytes of {media_type}, GET returned {len(raw)} of {got}",
            )
        parsed = parse_manifest(raw, media_type, f"manifest of {reference}")
        if isinstance(parsed, Manifest):
            return parsed
        raw, media_type = self._get_manifest(
            base, reference.repository, self._choose(parsed, reference)
        )
        inner = parse_manifest(raw, media_type, f"manifest of {reference}")
        if not isinstance(inner, Manifest):
            raise ManifestInvalid(f"manifest of {reference}", "an index within an index")
        return inner

    def _choose(self, index: Index, reference: Reference) -> Digest:
        fitting = [entry for entry in index.entries if self.platform in (None, entry.platform)]
        if len(fitting) != 1:
            platforms = ", ".join(entry.platform or "?" for entry in index.entries)
            raise ManifestInvalid(
                f"index of {reference}",
                f"its platform is ambiguous: it has {platforms}: choose one (--platform)",
            )
        return fitting[0].descriptor.digest

    def _head(self, base: str, reference: Reference) -> tuple[Digest, str, int]:
        url = f"{base}/v2/{reference.repository}/manifests/{reference.selector}"
        with self.http.request(
            "HEAD", url, self._headers(base), timeout=MANIFEST_TIMEOUT
        ) as answer:
            if answer.status != 200:
                raise answer.fault()
            media_type, length = answer.headers.get("content-type"), answer.length
            if media_type is None or length is None:
                raise ServerFault(
                    answer.request, "lacks Content-Type or Content-Length", status=answer.status
                )
            try:
                digest = Digest.parse(answer.headers.get("docker-content-digest", ""))
            except BadDigest as error:
                raise ServerFault(
                    answer.request, "lacks Docker-Content-Digest", status=answer.status
                ) from error
        if reference.digest is not None and reference.digest != digest:
            raise DigestMismatch(reference.digest, digest, f"manifest of {reference}")
        return digest, media_type, length

    def _get_manifest(self, base: str, repository: str, digest: Digest) -> tuple[bytes, str]:
        url = f"{base}/v2/{repository}/manifests/{digest}"
        with self.http.request("GET", url, self._headers(base), timeout=MANIFEST_TIMEOUT) as answer:
            if answer.status != 200:
                raise answer.fault()
            raw = answer.small(MAX_MANIFEST)
            media_type = answer.headers.get("content-type", "")
        if Digest.of(raw) != digest:
            raise DigestMismatch(digest, Digest.of(raw), "manifest")
        return raw, media_type

    def _config(self, base: str, repository: str, config: Descriptor) -> bytes:
        if config.size > MAX_CONFIG:
            raise ManifestInvalid("image config", f"it is larger than {MAX_CONFIG} bytes")
        raw = b"".join(self._blob(base, repository, config, 0))
        if Digest.of(raw) != config.digest:
            raise DigestMismatch(config.digest, Digest.of(raw), "image config")
        return raw

    def _headers(self, base: str) -> dict[str, str]:
        authorization = self._authorization(base)
        return {
            "Accept": ", ".join(ACCEPT),
            **({"Authorization": authorization} if authorization else {}),
        }

    def _blob(self, base: str, repository: str, blob: Descriptor, offset: int) -> Iterator[bytes]:
        """Yields a blob's bytes from an offset on, never more than the blob has."""
        url = f"{base}/v2/{repository}/blobs/{blob.digest}"
        wanted = {"Range": f"bytes={offset}-"} if offset else {}
        with self.http.follow(url, wanted, self._authorization(base)) as answer:
            if answer.status != (206 if offset else 200):
                raise answer.fault()
            part = f"bytes {offset}-{blob.size - 1}/{blob.size}"
            if offset and answer.headers.get("content-range") != part:
                raise ServerFault(
                    answer.request, f"gave another range than {part}", status=answer.status
                )
            for chunk in answer.chunks():
                offset += len(chunk)
                if offset > blob.size:
                    raise SizeMismatch(blob.size, offset, f"blob {blob.digest}")
                yield chunk
