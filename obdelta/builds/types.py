"""Types of builds: the pair of images, the answers to requests, and the interfaces of builders,
publishers, workers and watchers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol

from twisted.python.failure import Failure

from obdelta.builds.inputs.image_lookup import ResolvedImage
from obdelta.errors import ObdeltaError
from obdelta.oci import Digest, Form, Manifest, Reference, common_prefix
from obdelta.registry import Credentials
from obdelta.store.catalogue.failure_records import work_key
from obdelta.store.catalogue.records import DeltaKey, DeltaRow, Kind
from obdelta.store.file_writer import ExternalFile

if TYPE_CHECKING:
    from obdelta.builds.queue import FairQueue
    from obdelta.builds.replicas.leases import Lease
    from obdelta.builds.running_build import RunningBuild


@dataclass(frozen=True, slots=True)
class Pair:
    """Base and target of a delta. ``key`` names the contents for ever, even when tags move.

    ``form``: the form that a build makes, and the best form that the client reads.
    """

    kind: Kind
    recipe: int
    base: ResolvedImage
    target: ResolvedImage
    form: Form = Form.UNIVERSAL

    @property
    def key(self) -> DeltaKey:
        return DeltaKey(
            self.kind,
            self.recipe,
            self.base.manifest.digest,
            self.target.manifest.digest,
            self.form,
        )

    @property
    def readable(self) -> tuple[Pair, ...]:
        """The pair in each form that serves the client, best first."""
        return tuple(self.in_form(form) for form in self.form.readable)

    def in_form(self, form: Form) -> Pair:
        """Returns the pair in another form."""
        return replace(self, form=form)

    @property
    def repositories(self) -> tuple[str, str]:
        """The repositories of base and target."""
        return self.base.repository, self.target.repository

    @property
    def full_bytes(self) -> int:
        """The bytes of a full pull by a device that has the base, according to the manifests."""
        return self.pull_bytes(self.target.manifest)

    def pull_bytes(self, manifest: Manifest) -> int:
        """Returns the bytes that a device with the base pulls of the target, or of a delta to it.

        They are the config and the layers after those that base and target begin with.
        """
        base, target = self.base.manifest.layers, self.target.manifest.layers
        common = common_prefix((layer.digest for layer in base), (layer.digest for layer in target))
        return manifest.config.size + sum(layer.size for layer in manifest.layers[common:])

    @property
    def work(self) -> Digest:
        """Names the work by its layers: the same for other manifests and configs over them."""
        layers = [
            [layer.digest for layer in image.manifest.layers] for image in (self.base, self.target)
        ]
        return work_key(f"{self.kind} {self.recipe}", *layers)

    def __str__(self) -> str:
        return (
            f"{self.kind} {self.base.repository}@{self.base.manifest.digest.hex[:12]} -> "
            f"{self.target.repository}@{self.target.manifest.digest.hex[:12]}"
        )


class BuildCancelled(ObdeltaError):
    """An operator has ended the build."""

    def __init__(self) -> None:
        super().__init__("an operator cancelled the build")


Report = Callable[[Mapping[str, object]], None]
"""Receives the progress of a build."""
ReportFile = Callable[[ExternalFile], None]
"""Receives a file that clients can read while a builder writes it; called again as it grows."""
AcceptsFile = Callable[[ExternalFile], bool]
"""Returns whether a client can use a file that is still being written, as far as it has grown."""


class Builder(Protocol):
    """Builds one kind of delta. ``forms``: those that it makes, one a build."""

    kind: Kind
    recipe: int
    forms: tuple[Form, ...]

    async def build(
        self,
        pair: Pair,
        credentials: Credentials,
        report: Report,
        report_file: ReportFile,
        *,
        low_memory: bool = False,
    ) -> DeltaRow:
        """Builds, proves and publishes ``pair``; leftovers of a failure are removed.

        Returns the delta in the pair's form, or in the only form that the builder makes.
        ``low_memory``: with as little memory as possible, at any other cost. A failed proof also
        removes the cached layers or trees that it used: another attempt begins with fresh ones.
        """


def pair_for(
    builder: Builder, base: ResolvedImage, target: ResolvedImage, best: Form = Form.BEST
) -> Pair:
    """Returns the pair for a client. ``best``: the best form that the client reads.

    The universal form is built for clients that read nothing else, also by a builder of other ones.
    """
    form = best.best_of(builder.forms)
    return Pair(builder.kind, builder.recipe, base, target, form)


@dataclass(frozen=True, slots=True)
class Ready:
    """A proven delta that is visible in the pair's repositories. It may have been built for other
    repositories with the same contents.
    """

    pair: Pair
    delta: DeltaRow


@dataclass(frozen=True, slots=True)
class FullPull:
    """There is no delta for this pair, and there will be none for a while: the device should pull
    the target in full.

    ``category``: the name in the counters ``full_pull.*``. ``full_bytes``: see
    :attr:`Pair.full_bytes`, None if one of the images is not known.
    """

    reason: str
    category: str = field(default="", compare=False)
    full_bytes: int | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class Growing:
    """A delta that is being written, for a client that reads it meanwhile."""

    pair: Pair
    file: ExternalFile


@dataclass(frozen=True, slots=True)
class Published:
    """A delta in the registry itself, under ``name``; sizes as in
    :class:`~obdelta.store.catalogue.records.DeltaRow`.
    """

    pair: Pair
    name: Reference
    full_bytes: int
    delta_bytes: int


Answer = Ready | FullPull | Growing | Published


class Publisher(Protocol):
    """A destination of finished deltas of one kind besides the store (setting ``publish``).

    A published v3 delta has a name of its own (Published), a v2 batch keeps its URL (Ready).
    """

    async def find(self, pair: Pair) -> Published | Ready | None:
        """Returns the pair's delta if it is there already; never raises an ObdeltaError."""

    def begin(self, pair: Pair, row: DeltaRow) -> None:
        """Starts to publish a new delta; waits for nothing."""

    async def publish(self, pair: Pair, row: DeltaRow, deadline: float) -> Published | Ready | None:
        """Returns the published delta; None if that failed, and the delta is served from the
        store.

        Raises StillBuilding at ``deadline``.
        """


class Space(Protocol):
    """The space for deltas in the store."""

    async def admit(self) -> None:
        """Raises QuotaUsedUp if no new build may begin."""

    async def make_room(self) -> bool:
        """Frees space on a full disk. Returns whether there is some now."""

    def grew(self) -> None:
        """Checks the quota: a build has ended, and may have stored a delta."""


class Watcher(Protocol):
    """Receives events of builds, for metrics and pages. Its methods must be quick, and must not
    raise.
    """

    def requested(self, kind: Kind, found: str) -> None:
        """Records a request for a delta that was ``ready``, is ``building``, was ``started`` now,
        or cannot be (``refused``).
        """

    def changed(self, build: RunningBuild) -> None:
        """Records that a build was queued, was started, or made progress."""

    def ended(self, build: RunningBuild, outcome: DeltaRow | Failure, seconds: float) -> None:
        """Records that a build has its delta, or failed.

        ``seconds`` count since it was queued; it is no longer among ``running``.
        """


class Workers(Protocol):
    """Other machines that build (setting ``builds``)."""

    queue: FairQueue
    """The queue of the builds that they get. Builds here keep to their own one."""

    async def build(self, build: RunningBuild, report: Report) -> DeltaRow:
        """Has a delta built and pushed to the registry, and returns it. Raises the error of the
        build.
        """


@dataclass(frozen=True, slots=True, eq=False)
class Turn:
    """Our turn to build. ``lease`` is None if no other replica is involved."""

    pair: Pair
    lease: Lease | None = None


class Replicas(Protocol):
    """The interface to other replicas that builds use."""

    async def turn(self, pair: Pair, waited: float) -> Turn | DeltaRow | None:
        """Returns a turn if this replica should build; :meth:`report_end` must end it. Otherwise
        returns another replica's delta, or None while that one builds it.

        ``waited``: the seconds that this build has waited for others. Raises FailedElsewhere.
        """

    async def wait(self, pair: Pair, waited: float) -> None:
        """Waits until the building replica has ended, is believed to be dead, or takes too long."""

    def report_end(self, turn: Turn, outcome: DeltaRow | Failure) -> None:
        """Reports how the build ended. Waits for nothing."""

    async def forget(self, pair: Pair) -> None:
        """Forgets how another replica's build ended, since the pair is to be built again."""

    async def close(self) -> None:
        """Releases every turn."""


class SingleServer:
    """A single server without other replicas."""

    async def turn(self, pair: Pair, waited: float) -> Turn:
        """Returns our turn, always."""
        return Turn(pair)

    async def wait(self, pair: Pair, waited: float) -> None:
        """Does nothing: there is no other replica to wait for."""

    def report_end(self, turn: Turn, outcome: DeltaRow | Failure) -> None:
        """Does nothing: there is no other replica to inform."""

    async def forget(self, pair: Pair) -> None:
        """Does nothing: there is no other replica's build."""

    async def close(self) -> None:
        """Does nothing: there is no lease to release."""
