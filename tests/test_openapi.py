"""The OpenAPI description compared with the code and a running server: every route is in it, and
every answer is as described.
"""

from __future__ import annotations

import ast
import json
import re
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
import yaml
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.core.failures import FailureGroup

from obdelta.oci import Form
from tests.support.images import BASE_REPOSITORY, TARGET_REPOSITORY, Pair, make_pair
from tests.support.layout_server import server_with_tokens
from tests.support.processes import until_both_forms
from tests.support.server import RunningServer
from tests.support.tokens import Issuer, pulls
from tools.openapi import MADE, PAGE, SOURCE, converted, page

OBDELTA = Path(__file__).parent.parent / "obdelta"
ISSUER = Issuer()
TOKEN = {"Authorization": f"Bearer {ISSUER.token(pulls(BASE_REPOSITORY, TARGET_REPOSITORY))}"}
DESCRIPTION: dict[str, Any] = yaml.safe_load(SOURCE.read_text("utf-8"))
SCHEMA = schemathesis.openapi.from_dict(DESCRIPTION)
OPERATIONS = [
    (path, method.upper())
    for path, item in DESCRIPTION["paths"].items()
    for method in item
    if method in ("get", "head", "post", "put", "delete", "patch")
]
FEW = settings(
    max_examples=15,
    derandomize=True,
    deadline=None,
    suppress_health_check=[
        HealthCheck.function_scoped_fixture,
        HealthCheck.too_slow,
        HealthCheck.filter_too_much,
    ],
)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make_pair(tmp_path_factory.mktemp("pair"), size=64 << 10)


@pytest.fixture(scope="module")
def server(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    directory = tmp_path_factory.mktemp("server")
    with server_with_tokens(directory, pair, ISSUER) as running:
        yield running
        assert "Traceback" not in running.log


def operation(path: str, method: str) -> Any:
    return SCHEMA[path][method]


def base_url(server: RunningServer, path: str) -> str:
    return server.operator_url if "servers" in DESCRIPTION["paths"][path] else server.url


def ask(server: RunningServer, path: str, method: str = "GET", **arguments: Any) -> Any:
    """Sends one request, and compares its answer with the description."""
    case = operation(path, method).Case(**arguments)
    headers = server.key_header if method == "POST" else TOKEN
    answer = case.call(base_url=base_url(server, path), headers=headers, allow_redirects=False)
    case.validate_response(answer, headers=headers)
    return answer


# -- the files ---------------------------------------------------------------------------------


def test_files_made_from_the_yaml_are_up_to_date() -> None:
    assert MADE.read_text("utf-8") == converted(SOURCE.read_text("utf-8"))
    assert PAGE.read_text("utf-8") == page(PAGE.read_text("utf-8"), SOURCE.read_text("utf-8"))


def test_routes_and_descriptions_are_the_same_set() -> None:
    """Routes are read from the operators' table in the code."""
    added = set()
    for source in OBDELTA.rglob("*.py"):
        for node in ast.walk(ast.parse(source.read_text("utf-8"))):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and node.func.attr == "add"
            ):
                values = [each.value for each in node.args if isinstance(each, ast.Constant)]
                if (
                    len(values) == 2
                    and re.fullmatch(r"[A-Z]+", str(values[0]))
                    and str(values[1]).startswith("/")
                ):
                    added.add((str(values[1]).replace("...}", "}"), str(values[0])))
    assert ("/readyz", "GET") in added
    described = {
        (path, method)
        for path, method in OPERATIONS
        if "servers" in DESCRIPTION["paths"][path] or path == "/healthz"
    }
    assert described == added


def test_operation_ids_are_unique() -> None:
    identities = [
        DESCRIPTION["paths"][path][method.lower()]["operationId"] for path, method in OPERATIONS
    ]
    assert len(set(identities)) == len(identities)
    for path, method in OPERATIONS:
        tags = DESCRIPTION["paths"][path][method.lower()]["tags"]
        assert set(tags) <= {tag["name"] for tag in DESCRIPTION["tags"]}
        assert ("operators" in tags) == (
            "servers" in DESCRIPTION["paths"][path] or path == "/healthz"
        )


# -- the running server ------------------------------------------------------------------------


def test_the_server_describes_itself(server: RunningServer) -> None:
    with urllib.request.urlopen(f"{server.operator_url}/openapi.yaml", timeout=60) as answer:
        assert answer.headers["content-type"] == "application/yaml"
        assert yaml.safe_load(answer.read()) == DESCRIPTION
    with urllib.request.urlopen(f"{server.operator_url}/openapi.json", timeout=60) as answer:
        assert json.loads(answer.read()) == DESCRIPTION


def test_the_requests_of_an_update_are_answered_as_described(
    server: RunningServer, pair: Pair
) -> None:
    delta_query = {
        "src": f"{server.host}/{BASE_REPOSITORY}",
        "dest": f"{server.host}/{TARGET_REPOSITORY}",
        "wait": "true",
    }
    assert ask(server, "/v2/").status_code == 200
    answer = ask(server, "/api/v3/delta", query=delta_query)
    assert answer.status_code == 200
    name, _, tag = answer.json()["name"].rpartition(":")
    assert name == f"{server.host}/{TARGET_REPOSITORY}"
    for method in ("GET", "HEAD"):
        where = {"name": TARGET_REPOSITORY, "reference": tag}
        manifest = ask(server, "/v2/{name}/manifests/{reference}", method, path_parameters=where)
        assert manifest.status_code == 200
    layer = ask(server, "/v2/{name}/manifests/{reference}", path_parameters=where).json()["layers"][
        -1
    ]
    where = {"name": TARGET_REPOSITORY, "digest": layer["digest"]}
    assert (
        len(ask(server, "/v2/{name}/blobs/{digest}", path_parameters=where).content)
        == layer["size"]
    )
    part = ask(
        server, "/v2/{name}/blobs/{digest}", path_parameters=where, headers={"Range": "bytes=1-"}
    )
    assert part.status_code == 206
    beyond = ask(
        server,
        "/v2/{name}/blobs/{digest}",
        path_parameters=where,
        headers={"Range": "bytes=99999999-"},
    )
    assert beyond.status_code == 416
    assert (
        ask(server, "/v2/{name}/tags/list", path_parameters={"name": TARGET_REPOSITORY}).status_code
        == 200
    )

    both = {name: delta_query[name] for name in ("src", "dest")}
    assert ask(server, "/api/v1/deltas", query=both).json()["delta"]["tag"] == tag
    assert ask(server, "/api/v1/deltas", query={**both, "src": "x"}).status_code == 404
    assert (
        ask(
            server, "/api/v1/blobs/{digest}", path_parameters={"digest": layer["digest"]}
        ).status_code
        == 200
    )
    until_both_forms(server)
    listed = ask(server, "/api/v1/deltas/list", query={"limit": 1}).json()
    where = {"id": listed["deltas"][0]["id"]}
    assert listed["next"] and ask(server, "/api/v1/deltas/{id}", path_parameters=where).json()
    for action, status in (("retry", 409), ("drop", 200), ("drop", 404)):
        case = operation("/api/v1/deltas/{id}/{action}", "POST").Case(
            path_parameters={**where, "action": action}, body={}, media_type="application/json"
        )
        answer = case.call(base_url=server.operator_url, headers=server.key_header)
        case.validate_response(answer, headers=server.key_header)
        assert answer.status_code == status
    assert ask(server, "/api/v1/status").json()["kept"]["deltas"] > 0
    assert (
        ask(server, "/api/v1/gc", "POST", body={}, media_type="application/json").json()["freed"]
        == 0
    )
    wanted = {"pairs": [{name: delta_query[name] for name in ("src", "dest")}]}
    begun = ask(server, "/api/v1/prepare", "POST", body=wanted, media_type="application/json")
    assert begun.status_code == 202
    where = {"id": begun.json()["id"]}
    assert (
        ask(server, "/api/v1/prepare/{id}/events", path_parameters=where).text.count(
            "event: done\n"
        )
        == 1
    )
    assert ask(server, "/api/v1/prepare/{id}", path_parameters=where).json()["done"]
    where = {"id": begun.json()["jobs"][0]["id"]}
    assert ask(server, "/api/v1/prepare/{id}", path_parameters=where).json()["delta_bytes"] > 0
    for path in ("/healthz", "/readyz"):
        answer = (
            operation(path, "GET")
            .Case()
            .call(base_url=server.operator_url, headers={"Accept": "application/json"})
        )
        operation(path, "GET").validate_response(answer)
        assert answer.json()

    answer = ask(server, "/api/v2/delta", query=delta_query)
    assert answer.status_code == 300
    query = dict(
        pair.partition("=")[::2]
        for pair in answer.headers["location"][0].partition("?")[2].split("&")
    )
    assert ask(server, "/api/v2/delta/download", query=query).status_code == 200
    assert ask(server, "/api/v2/delta/download", query={**query, "expires": "1"}).status_code == 403
    assert ask(server, "/api/v2/delta/download", query={"full-pull": "yes"}).status_code == 200


@pytest.mark.parametrize(("path", "method"), OPERATIONS)
def test_each_request_is_answered_as_described(
    server: RunningServer, path: str, method: str
) -> None:
    """Requests generated from the description, valid and invalid: every status, type and body is
    described.
    """
    for mode in GenerationMode:
        if mode is GenerationMode.NEGATIVE and not list(operation(path, method).iter_parameters()):
            continue  # there is no input to vary

        @FEW
        @given(case=operation(path, method).as_strategy(generation_mode=mode))
        def answered(case: Any) -> None:
            login = server.key_header if method == "POST" else TOKEN
            headers = {} if case.headers and "Authorization" in case.headers else login
            answer = case.call(
                base_url=base_url(server, path), headers=headers, allow_redirects=False
            )
            case.validate_response(
                answer,
                excluded_checks=[
                    # The code's own tests check whether a value is refused; this one checks the
                    # form of the answer.
                    schemathesis.checks.negative_data_rejection,
                    schemathesis.checks.positive_data_acceptance,
                    # Unknown methods and parameters that repeat are for test_server_fuzz.
                    schemathesis.checks.unsupported_method,
                ],
            )

        answered()


def test_a_wrong_answer_is_detected(server: RunningServer) -> None:
    """The comparison above can fail."""
    wrong = json.loads(json.dumps(DESCRIPTION))
    wrong["components"]["schemas"]["Name"]["required"] = ["tag"]
    case = schemathesis.openapi.from_dict(wrong)["/api/v3/delta"]["GET"].Case(
        query={"src": BASE_REPOSITORY, "dest": TARGET_REPOSITORY, "wait": "true"}
    )
    with pytest.raises((FailureGroup, AssertionError)):
        case.validate_response(case.call(base_url=server.url, headers=TOKEN))


def lists_of_forms(part: object, name: str = "") -> Iterator[list[str | None]]:
    """Yields the enums of parameters and properties that are forms."""
    if isinstance(part, list):
        for each in part:
            yield from lists_of_forms(each)
    if isinstance(part, dict):
        name = part["name"] if isinstance(part.get("name"), str) else name
        if name in ("form", "reads") and "enum" in part:
            yield part["enum"]
        for key, value in part.items():
            yield from lists_of_forms(value, name if key == "schema" else key)


def test_its_lists_of_forms_are_those_of_the_code() -> None:
    found = list(lists_of_forms(DESCRIPTION))
    assert len(found) == 6
    for listed in found:
        assert [name for name in listed if name is not None] == [form.value for form in Form]
