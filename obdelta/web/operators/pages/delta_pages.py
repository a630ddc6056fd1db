"""Serves the pages of all deltas, of fleets and of help, and takes the forms of their buttons."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Mapping

from obdelta.builds.delta_actions import DeltaActions
from obdelta.errors import BadRequest
from obdelta.oci import Digest, ImageNames
from obdelta.registry import Credentials
from obdelta.store.catalogue.catalogue import Catalogue
from obdelta.store.catalogue.listed_deltas import SORTS
from obdelta.web.operators.actions_api import cursor, cursor_of, sort_of, wanted_of
from obdelta.web.operators.login import ActionGuard
from obdelta.web.operators.pages import fleets_page, help_page, list_page
from obdelta.web.operators.pages.markup import document
from obdelta.web.operators.pages.sections.action_forms import ActionForms
from obdelta.web.operators.routes import Answer, Call, NotFound, Routes, Whole

ROWS = 50
MAX_FLEETS = 100
"""Fleets to choose from."""
_QUERY = ("search", "state", "kind", "form", "fleet", "sort", "after")
_BACK = re.compile(r"/(?:(?:deltas|pairs)[/?][!-~]{0,1000}|deltas)?", re.ASCII)
"""Pages of ours to display after an action."""


class DeltaPages:
    """Serves ``/deltas``, ``/fleets``, ``/help`` and the forms of actions."""

    def __init__(
        self,
        actions: DeltaActions,
        guard: ActionGuard,
        catalogue: Catalogue,
        credentials: Callable[[bytes | None], Credentials],
        now: Callable[[], float] = time.time,
    ) -> None:
        self._actions, self._guard, self._catalogue = actions, guard, catalogue
        self._credentials, self._now = credentials, now

    def add_to(self, routes: Routes) -> None:
        routes.page("/deltas", self.list)
        routes.page("/fleets", self.fleets)
        routes.page("/help", self.help)
        routes.form("/deltas/{id}/{action}", self.act)

    async def list(self, call: Call) -> Answer:
        """Returns the page of all deltas."""
        wanted, sort = await wanted_of(call, self._actions), sort_of(call)
        found = await self._actions.page(wanted, sort, ROWS + 1, cursor_of(call))
        shown = found[:ROWS]
        query = {name: call.argument(name) or "" for name in _QUERY}
        if query["sort"] == next(iter(SORTS)):
            query["sort"] = ""
        names = await self._names(
            image for delta in shown for image in (delta.key.base, delta.key.target)
        )
        fleets = await self._fleets_to_choose()
        return await document(
            "Deltas · obdelta",
            *list_page.content(
                shown,
                query,
                fleets,
                cursor(shown[-1], sort) if len(found) > ROWS else None,
                self._now(),
                forms_of(self._guard),
                names,
            ),
            at="/deltas",
        )

    async def _fleets_to_choose(self) -> Mapping[str, str]:
        """Returns the repositories that fleets are named after, each with what its image calls its
        fleet and service.
        """
        found = (await self._catalogue.fleet_summaries())[:MAX_FLEETS]
        images = {fleet.repository: fleet.images.get(fleet.repository) for fleet in found}
        names = await self._names(image for image in images.values() if image is not None)
        texts = {}
        for repository, image in images.items():
            named = names.get(image) if image is not None else None
            parts = (named.fleet, named.service) if named is not None else ()
            texts[repository] = "/".join(part for part in parts if part) or repository
        return texts

    async def fleets(self, call: Call) -> Answer:
        """Returns the page of fleets."""
        found = await self._catalogue.fleet_summaries()
        shown = found[: fleets_page.MAX_FLEETS]
        names = await self._names(image for fleet in shown for image in fleet.images.values())
        content = fleets_page.content(found, self._now(), names)
        return await document("Fleets · obdelta", *content, at="/fleets")

    async def _names(self, images: Iterable[Digest]) -> Mapping[Digest, ImageNames]:
        return await self._catalogue.named_images.of(list(images))

    async def help(self, call: Call) -> Answer:
        """Returns the page of help."""
        return await document("Help · obdelta", *help_page.content(), at="/help")

    async def act(self, call: Call) -> Answer:
        """Does an action for a form of a page of ours, and leads back to that page."""
        form, action = call.form(), call.parameters["action"]
        self._guard.check_form(form.get("token", ""))
        if action not in self._actions.names:
            raise NotFound
        back = form.get("back", "/")
        if not _BACK.fullmatch(back):
            raise BadRequest("the form leads to a page that is not this server's")
        await self._actions.act(action, call.parameters["id"], self._credentials(None), call.user)
        return Whole(b"", status=303, headers={"location": back})


def forms_of(guard: ActionGuard) -> ActionForms:
    """Returns the buttons for those who may act; none if browsers cannot."""
    return ActionForms(guard.form_token if guard.enabled else "")
