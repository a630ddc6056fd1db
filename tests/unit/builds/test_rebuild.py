"""Readers of layers that are rebuilt."""

from __future__ import annotations

from pathlib import Path

import pytest
import pytest_twisted
from twisted.internet.testing import StringTransport

from obdelta.builds.inputs.image_lookup import ResolvedImage
from obdelta.builds.rebuild import Rebuild
from obdelta.builds.types import Pair
from obdelta.concurrency.tasks import Threads
from obdelta.errors import BlobUnknown
from obdelta.oci import Descriptor, Digest
from obdelta.store.catalogue.evictions import Evicted
from tests.support.build_service import A, B, manifest_of, row_of
from tests.support.web import reactor


@pytest_twisted.ensureDeferred
async def test_readers_of_a_layer_that_is_gone_do_not_wait_for_ever(tmp_path: Path) -> None:
    """The other layer's readers get all bytes."""
    contents = [b"first layer", b"second layer"]
    layers = tuple(Descriptor("", Digest.of(each), len(each)) for each in contents)
    threads = Threads(reactor, reactor.getThreadPool())
    base, target = [ResolvedImage(one.repository, manifest_of(one.repository)) for one in (A, B)]
    row = row_of(Pair("v3", 1, base, target))
    rebuild = Rebuild(Evicted(row, layers, "fast", {}), threads)
    stored = tmp_path / "stored"
    stored.write_bytes(contents[0])
    sent, deliveries = [], []
    for layer in layers:
        file = rebuild.file(layer.digest)
        assert file is not None
        sent.append(StringTransport())
        deliveries.append(file.deliver(sent[-1]))
    rebuild.finished({layers[0].digest: stored}.get)
    await deliveries[0]
    assert sent[0].value() == contents[0]
    with pytest.raises(BlobUnknown):
        await deliveries[1]
