"""A builder, and what a model knows of clients and builds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from twisted.internet.defer import Deferred
from twisted.python.failure import Failure

from obdelta.builds.delta_size_limit import DeltaTooLarge
from obdelta.builds.types import Answer, Pair, Report, ReportFile
from obdelta.errors import Denied, LayerInvalid, ProofFailed, StoreFull, WorkerFailed
from obdelta.oci import Form, Reference
from obdelta.registry import Credentials
from obdelta.store.blobs import BlobStore
from obdelta.store.catalogue.catalogue import Catalogue
from obdelta.store.catalogue.records import DeltaRow, Kind
from tests.support.build_service import row_of

IMAGES = {letter: Reference("", f"v2/{letter * 32}") for letter in "abcd"}
PAIRS = ("ab", "ac", "bc", "ad", "cb", "db")
SLOTS, QUEUE_LIMIT, CLIENT_LIMIT, MEMORY, STARTS = 2, 2, 3, 600, 2
ERRORS: dict[str, Callable[[], Exception]] = {
    "not worth": lambda: DeltaTooLarge(95, 100),
    "broken": lambda: LayerInvalid("sha256:1", "not a tar"),
    "killed": lambda: WorkerFailed("killed by signal 9"),
    "unproven": lambda: ProofFailed("layer 3", "other bytes"),
    "full": lambda: StoreFull("no space is left on the disk"),
    "denied": lambda: Denied("no"),
    "unexpected": ZeroDivisionError,
}
ONCE_MORE = {"killed", "unproven", "full"}


class Builder:
    """A double: each attempt waits for the model, and then publishes its delta."""

    kind: Kind = "v2"
    recipe = 1
    forms: tuple[Form, ...] = (Form.GZIP,)

    def __init__(self, blobs: BlobStore, catalogue: Catalogue) -> None:
        self._blobs, self._catalogue = blobs, catalogue
        self.attempts: dict[str, tuple[Deferred[None], bool]] = {}

    async def build(
        self,
        pair: Pair,
        credentials: Credentials,
        report: Report,
        report_file: ReportFile,
        *,
        low_memory: bool = False,
    ) -> DeltaRow:
        name = pair_of(pair)
        assert name not in self.attempts, "a pair is built once at a time"
        assert len(self.attempts) < SLOTS
        go: Deferred[None] = Deferred()
        self.attempts[name] = (go, low_memory)
        try:
            await go
        finally:
            del self.attempts[name]
        row = row_of(pair, name.encode(), len(name))
        return await self._catalogue.publish_v2(row, self._blobs)


@dataclass(eq=False)
class Client:
    """A client; ``until``: when its wait ends. ``second``: it retries with its own credentials
    after another client's were refused.
    """

    name: str
    pair: str
    until: float
    request: Deferred[Answer]
    outcomes: list[object] = field(default_factory=list)
    second: bool = False

    def expect(self, *kinds: type) -> None:
        """Asserts that its only outcome is one of these."""
        assert len(self.outcomes) == 1, self
        (outcome,) = self.outcomes
        value = outcome.value if isinstance(outcome, Failure) else outcome
        assert isinstance(value, kinds), (self, value)


@dataclass
class Build:
    """The model's record of one build. ``by``: the client that started it; None where the server
    resumed it.
    """

    by: str | None
    low_memory: bool = False
    starts: int = 0


def pair_of(pair: Pair) -> str:
    """Returns the letters of a pair's images."""
    return pair.base.repository[3] + pair.target.repository[3]
