"""What operators reach: each part adds its routes here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from twisted.internet.interfaces import IListeningPort

from obdelta.builds.coordinator import Coordinator
from obdelta.net.listen import listen
from obdelta.net.proxy import ForwardedClients
from obdelta.settings import Settings
from obdelta.web.operators import OperatorFace, Overview
from obdelta.web.site import make_site
from obdelta.wiring.state import State


def make_operator_face(
    configured: Settings, reactor: Any, *, state: State, coordinator: Coordinator, notes: Sequence[Callable[[], str]]
) -> OperatorFace:
    """The operators' table of routes, filled. ``notes``: lines for ``/readyz``."""
    face = OperatorFace(configured.operator_hosts or ())
    overview = Overview(coordinator, state.upkeep, reactor)
    overview.notes += notes
    overview.add_to(face.routes)
    return face


async def listen_for_operators(configured: Settings, reactor: Any, face: OperatorFace) -> list[IListeningPort]:
    """The operators' ports; the caller stops them."""
    site = make_site(face, reactor, clients=ForwardedClients(None))
    return await listen(configured.operator_listen, site, reactor, setting="operator-listen")
