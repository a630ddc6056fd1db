"""Serves the OpenAPI description of this server: ``/openapi.yaml`` and ``/openapi.json``."""

from __future__ import annotations

from importlib.resources import files

from obdelta.web.operators.routes import Answer, Call, Routes, Whole


class Description:
    """Serves the two files beside this module, which are read once."""

    def __init__(self) -> None:
        here = files("obdelta.web.operators")
        self._yaml = (here / "openapi.yaml").read_bytes()
        self._json = (here / "openapi.json").read_bytes()

    def add_to(self, routes: Routes) -> None:
        routes.add("GET", "/openapi.yaml", self.yaml)
        routes.add("GET", "/openapi.json", self.json)

    async def yaml(self, call: Call) -> Answer:
        """Returns the description in YAML."""
        return Whole(self._yaml, "application/yaml")

    async def json(self, call: Call) -> Answer:
        """Returns the description in JSON."""
        return Whole(self._json, "application/json")
