"""Wiring of the balena-engine that builds, where the settings name one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from twisted.internet.defer import CancelledError, ensureDeferred
from twisted.logger import Logger
from twisted.python.failure import Failure
from twisted.python.threadpool import ThreadPool

from obdelta.app.state import Closers, State
from obdelta.builds.engine.api import EngineApi, TlsFiles
from obdelta.builds.engine.images import Engine
from obdelta.concurrency.threads import Threads
from obdelta.errors import SettingsError
from obdelta.settings import Settings

log = Logger()


def tls_files(configured: Settings) -> TlsFiles | None:
    """Returns the TLS files for the engine, None where it is reached without TLS. Raises
    SettingsError for missing files.
    """
    if configured.docker_host.startswith("unix:"):
        return None
    if not configured.docker_tls_verify and configured.docker_cert_path is None:
        return None
    folder = configured.docker_cert_path or Path.home() / ".docker"
    files = TlsFiles.of(folder)
    for path in (files.ca, files.certificate, files.key):
        if not path.is_file():
            raise SettingsError("docker-cert-path", str(folder), f"a folder with {path.name}")
    return files


def make_engine(
    configured: Settings, reactor: Any, state: State, closers: Closers
) -> Engine | None:
    """Returns the engine with threads of its own, None where ``builder`` does not name it. Raises
    SettingsError.

    Meanwhile, leftovers of an earlier process are removed from the engine.
    """
    if "balena-engine" not in configured.builder:
        return None
    if configured.publish_host is None:
        raise SettingsError(
            "builder", " ".join(configured.builder), "native, where the upstream is oci:DIR"
        )
    files = tls_files(configured)
    if files is None and configured.docker_host.startswith("tcp:"):
        log.warn(
            "the engine at {url} is spoken to without TLS: it is given credentials",
            url=configured.docker_host,
        )
    # One thread for each build, and one for readiness.
    pool = ThreadPool(0, configured.max_builds + 1, "engine")
    pool.start()

    async def stop() -> None:
        pool.stop()

    closers.append(stop)
    engine = Engine(
        EngineApi(configured.docker_host, files),
        Threads(reactor, pool),
        configured.publish_host,
        state.catalogue.engine_names,
    )
    tidying = ensureDeferred(engine.tidy())
    tidying.addErrback(_not_tidied)

    async def end() -> None:
        tidying.cancel()
        await tidying

    closers.append(end)
    return engine


def _not_tidied(failure: Failure) -> None:
    if not failure.check(CancelledError):
        log.warn(
            "what the engine has of earlier builds was not removed: {reason}",
            reason=failure.getErrorMessage(),
        )
