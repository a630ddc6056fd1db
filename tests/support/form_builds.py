"""A service that builds both forms of one pair."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from twisted.internet.defer import Deferred, ensureDeferred
from twisted.internet.task import deferLater

from obdelta.builds.queue import Priority
from obdelta.builds.types import Answer, FullPull
from obdelta.oci import Form
from tests.support.build_service import ANONYMOUS, A, B, World, world
from tests.support.web import reactor


class Setting:
    """A service whose setting ``delta-compression`` makes these forms."""

    def __init__(self, w: World, *forms: Form, **options: Any) -> None:
        self.world = w
        self.service = w.v3_service(*forms, **{"max_builds": 2, **options})

    def ask(self, form: Form | None, priority: Priority = Priority.DEVICE) -> Deferred[Answer]:
        return ensureDeferred(
            self.service.delta("v3", A, B, ANONYMOUS, 45.0, priority=priority, form=form)
        )

    async def until_building(self, *forms: Form) -> None:
        """Waits until builds of these forms have begun, in this order, and no others."""
        await self.world.until_building(len(forms))
        assert [pair.form for pair, _ in self.world.builder.builds] == list(forms)

    async def publish(self, folder: Path, form: Form, **changed: Any) -> None:
        await self.world.publish_v3(folder, form, **changed)

    async def until_idle(self) -> None:
        """Waits until no build is queued or under way."""
        while self.service.running:
            await deferLater(reactor, 0.01, lambda: None)

    async def until_considered(self) -> None:
        """Waits for the decision whether the other form is built."""
        other_forms = self.service._other_forms
        assert other_forms is not None
        while other_forms._tasks:
            await deferLater(reactor, 0.01, lambda: None)

    async def fails(self, form: Form, error: Exception, builds: int) -> None:
        """Lets a client of this form start the build with this number, which fails."""
        request = self.ask(form)
        await self.world.until_building(builds)
        self.world.builder.finish(error=error)
        assert isinstance(await request, FullPull)


@asynccontextmanager
async def setting(tmp_path: Path, *forms: Form, **options: Any) -> AsyncIterator[Setting]:
    async with world(tmp_path) as w:
        made = Setting(w, *forms, **options)
        try:
            yield made
        finally:
            await made.service.close()
