"""``/openapi.yaml`` and ``/openapi.json``: what this server answers, for programs. The files beside
this one, as they are.
"""

from __future__ import annotations

from importlib.resources import files

from obdelta.web.operators.routes import Answer, Call, Routes, Whole


class Description:
    """Serves the two files; they are read once."""

    def __init__(self) -> None:
        here = files("obdelta.web.operators")
        self._yaml = (here / "openapi.yaml").read_bytes()
        self._json = (here / "openapi.json").read_bytes()

    def add_to(self, routes: Routes) -> None:
        """Its routes."""
        routes.add("GET", "/openapi.yaml", self.yaml)
        routes.add("GET", "/openapi.json", self.json)

    async def yaml(self, call: Call) -> Answer:
        """As it is written."""
        return Whole(self._yaml, "application/yaml")

    async def json(self, call: Call) -> Answer:
        """The same in JSON."""
        return Whole(self._json, "application/json")
