"""Metrics: a running server exports those in docs/metrics.md, and those of several processes are
added.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import pytest_twisted
from prometheus_client.core import Metric
from prometheus_client.openmetrics import parser as openmetrics
from prometheus_client.parser import text_string_to_metric_families

from obdelta.builds.build_metrics import reason_of, stage_seconds, worker_memory
from obdelta.errors import UpstreamUnavailable
from obdelta.observability import Metrics
from obdelta.observability.metrics import MAX_FLEETS
from obdelta.oci import Reference
from obdelta.web.devices.app import device_route
from tests.server.test_v3 import device_of, names, update
from tests.support.images import Pair, make_pair
from tests.support.server import RunningServer, running_server

PAGE = Path(__file__).parents[3] / "docs/metrics.md"
parse_openmetrics: Callable[[str], Iterable[Metric]] = openmetrics.text_string_to_metric_families
Families = dict[str, tuple[str, set[str]]]
"""Maps a metric's name in the documentation to its type and labels."""


def documented() -> Families:
    rows = re.findall(r"^\| `(obdelta_\w+)` \| (\w+) \|([^|]*)\|", PAGE.read_text(), re.MULTILINE)
    return {
        name: (kind, set(filter(None, labels.strip().split(", ")))) for name, kind, labels in rows
    }


def read(server: RunningServer, accept: str = "") -> str:
    prepared = urllib.request.Request(f"{server.operator_url}/metrics", headers={"Accept": accept})
    with urllib.request.urlopen(prepared, timeout=30) as answer:
        return str(answer.read().decode())


def families(text: str) -> Families:
    found = {}
    for family in text_string_to_metric_families(text):
        labels = {label for sample in family.samples for label in sample.labels} - {"le"}
        found[family.name + ("_total" if family.type == "counter" else "")] = (family.type, labels)
    return found


def values(text: str) -> dict[str, float]:
    """Maps ``name{label="value"}``, as written in the text, to the value."""
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Returns the metrics after an update, the opposite one and the builds before them, as text
    and OpenMetrics.
    """
    root = tmp_path_factory.mktemp("metrics")
    pair: Pair = make_pair(root)
    upstream = f"oci:{pair.root}"
    with running_server(root / "state", upstream=upstream, delta_compression="gzip") as server:
        assert update(server, root / "device").is_delta
        device, (base, target), work = device_of(server), names(server), root / "back"
        work.mkdir()
        assert device.update(
            device.load_base(Reference.parse(target), work), target, base, work
        ).is_delta
        return read(server), read(server, "application/openmetrics-text; version=1.0.0")


def test_the_table_is_what_a_server_exports(exported: tuple[str, str]) -> None:
    found = {
        name: family
        for name, family in families(exported[0]).items()
        if not name.startswith("process_")
    }
    table = documented()
    assert found.keys() == table.keys()
    for name, (kind, labels) in found.items():
        assert kind == table[name][0], name
        # A family with labels has no series before its first count.
        assert labels in (table[name][1], set()), name
    seen = {name for name, (_, labels) in found.items() if labels == table[name][1]}
    assert {
        "obdelta_builds_total",
        "obdelta_served_full_bytes_total",
        "obdelta_store_bytes",
    } <= seen


def test_an_update_is_seen(exported: tuple[str, str]) -> None:
    found = values(exported[0])
    assert found['obdelta_builds_total{kind="v3",outcome="ready",reason=""}'] == 2
    assert found['obdelta_served_deltas_total{kind="v3"}'] >= 1
    saved = (
        found['obdelta_served_full_bytes_total{kind="v3"}']
        - found['obdelta_served_delta_bytes_total{kind="v3"}']
    )
    assert saved > 0
    assert found['obdelta_cache_requests_total{cache="layers",result="miss"}'] > 0
    # The shared layer is known when the opposite delta is built; all other layers are new.
    assert found['obdelta_cache_requests_total{cache="indexes",result="hit"}'] > 0
    assert not any(name.startswith("obdelta_delta_faults_total") for name in found)
    assert found['obdelta_cache_requests_total{cache="indexes",result="miss"}'] > 3
    for stage in ("fetch", "index", "match", "deflate", "prove"):
        assert (
            found[f'obdelta_build_stage_duration_seconds_count{{kind="v3",stage="{stage}"}}'] == 2
        ), stage
    assert found['obdelta_delta_answers_total{answer="started",kind="v3"}'] == 2
    blobs = (
        'obdelta_http_requests_total{endpoint="devices",'
        'route="/v2/{name}/blobs/{digest}",status="200"}'
    )
    assert found[blobs] > 0
    assert found["obdelta_workers"] >= 1
    assert found["obdelta_worker_resident_memory_bytes"] > 1_000_000
    assert found["obdelta_worker_peak_resident_memory_bytes"] > 10_000_000
    assert found['obdelta_store_bytes{kind="deltas"}'] > 0
    assert found["obdelta_devices_connected"] == 0
    assert found['obdelta_http_connections{endpoint="operators"}'] == 1


def test_openmetrics_text_is_valid(exported: tuple[str, str]) -> None:
    assert "obdelta_builds" in {family.name for family in parse_openmetrics(exported[1])}


def test_promtool_accepts_the_text(exported: tuple[str, str]) -> None:
    checked = subprocess.run(
        ["promtool", "check", "metrics"],
        input=exported[0],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (checked.returncode, checked.stdout + checked.stderr) == (0, "")


def test_documented_events_are_counted_events() -> None:
    page = PAGE.read_text().partition("## Events")[2]
    listed = {
        f"{area}.{event}"
        for area, events in re.findall(r"^\| `(\w+)` \| ([^|]+) \|", page, re.MULTILINE)
        for event in re.findall(r"`([\w-]+)`", events)
    }
    source = "".join(path.read_text() for path in (PAGE.parent.parent / "obdelta").rglob("*.py"))
    calls = re.findall(r"(?:catalogue\.add|_count|_counted)\(([^)]*)\)", source)
    counted = {name for call in calls for name in re.findall(r'"([a-z_]+\.[a-z_-]+)"', call)}
    assert counted
    assert counted <= listed, "these are not in docs/metrics.md"


@pytest.mark.parametrize(
    ("path", "route"),
    [
        ("/v2/", "/v2/"),
        ("/v2/a/b/manifests/latest", "/v2/{name}/manifests/{reference}"),
        ("/v2/a/blobs/sha256:00", "/v2/{name}/blobs/{digest}"),
        ("/v2/a/tags/list", "/v2/{name}/tags/list"),
        ("/api/v3/delta", "/api/v3/delta"),
        ("/v2/a/uploads/1", "none"),
        ("/\xff" * 100, "none"),
    ],
)
def test_labels_of_routes_are_bounded(path: str, route: str) -> None:
    assert device_route(path) == route


def test_labels_of_reasons_are_bounded() -> None:
    assert reason_of(UpstreamUnavailable("x")) == "upstream-unavailable"
    assert reason_of(RuntimeError("x")) == "unexpected"
    assert reason_of(None) == "unexpected"


def test_stages_of_layers_are_summed_up() -> None:
    details = {
        "seconds": {"fetch": 1},
        "layers": [{"seconds": {"index": 1, "match": 2}}, {"seconds": {"match": 3}}],
    }
    assert stage_seconds(details) == {"fetch": 1, "index": 1, "match": 5}
    assert stage_seconds({}) == {}


def test_memory_of_workers_includes_their_children() -> None:
    before = worker_memory()
    script = (
        "import subprocess, sys\n"
        "child = subprocess.Popen(['cat'], stdin=sys.stdin)\n"
        "print(child.pid, flush=True)\n"
        "child.wait()\n"
    )
    command = [sys.executable, "-c", script, "obdelta.processes.worker_main"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as worker:
        assert worker.stdout is not None
        worker.stdout.readline()
        count, size = worker_memory()
        assert worker.stdin is not None
        worker.stdin.close()
    assert count == before[0] + 2
    assert size > before[1] + 1_000_000


@pytest_twisted.ensureDeferred
async def test_speeds_of_devices_disappear_with_their_measurements() -> None:
    metrics = Metrics()
    speed = 'obdelta_device_link_bytes_per_second{reads="gzip"}'
    metrics.devices_estimated("gzip", [(3, 8_000.0, 2.0)])
    assert (await exposed(metrics))[speed] == 1000
    metrics.devices_estimated("gzip", [])
    left = await exposed(metrics)
    assert speed not in left and 'obdelta_device_command_seconds{reads="gzip"}' not in left
    assert left['obdelta_measured_devices{reads="gzip"}'] == 0


@pytest_twisted.ensureDeferred
async def test_fleets_beyond_the_limit_share_a_label() -> None:
    metrics = Metrics()
    for number in range(MAX_FLEETS + 10):
        metrics.fleet_prepared(f"fleet-{number}", "ready", 2)
    metrics.fleet_prepared("fleet-0", "failed", 1)
    series = await exposed(metrics)
    found = {name: value for name, value in series.items() if "fleet_prepared_deltas_t" in name}
    assert len(found) == MAX_FLEETS + 2
    name = "obdelta_fleet_prepared_deltas_total"
    assert found[f'{name}{{fleet="other fleets",state="ready"}}'] == 20
    assert found[f'{name}{{fleet="fleet-0",state="failed"}}'] == 1


async def exposed(metrics: Metrics) -> dict[str, float]:
    _, body = await metrics.text()
    return values(body.decode())


@pytest_twisted.ensureDeferred
async def test_metrics_of_processes_are_added() -> None:
    mine, other = Metrics(), Metrics()
    for metrics in (mine, other, other):
        metrics.request_ended("devices", "/v2/", 200, 0.02, 10)
    other.request_ended("devices", "/v2/", 404, 0.3, 1)
    other.devices.set(3)
    mine.devices.set(1)
    copied = json.loads(json.dumps(other.snapshot()))
    for _ in range(2):
        mine.absorb("1", copied)
    found = await exposed(mine)
    assert found['obdelta_http_requests_total{endpoint="devices",route="/v2/",status="200"}'] == 3
    assert found['obdelta_http_requests_total{endpoint="devices",route="/v2/",status="404"}'] == 1
    assert (
        found[
            'obdelta_http_request_duration_seconds_bucket{endpoint="devices",le="0.025",route="/v2/"}'
        ]
        == 3
    )
    assert (
        found['obdelta_http_request_duration_seconds_count{endpoint="devices",route="/v2/"}'] == 4
    )
    assert found["obdelta_devices_connected"] == 4
    assert [found[name] for name in found if name.startswith("obdelta_build_info")] == [1]
    mine.retire("1")
    mine.absorb("2", Metrics().snapshot())
    found = await exposed(mine)
    assert found['obdelta_http_requests_total{endpoint="devices",route="/v2/",status="200"}'] == 3
    assert found["obdelta_devices_connected"] == 1


@pytest_twisted.ensureDeferred
async def test_a_series_of_another_process_alone_is_exported() -> None:
    mine, other = Metrics(), Metrics()
    other.request_ended("devices", "/healthz", 200, 700.0, 3)
    mine.absorb("1", other.snapshot())
    _, body = await mine.text("application/openmetrics-text; version=1.0.0")
    (family,) = [
        family
        for family in parse_openmetrics(body.decode())
        if family.name == "obdelta_http_request_duration_seconds"
    ]
    bounds = [float(sample.labels["le"]) for sample in family.samples if "le" in sample.labels]
    assert bounds == sorted(bounds) and bounds[-1] == float("inf")


@pytest.mark.parametrize("copied", [[1], [["a", {}, "x"]], [["a", 1, 1]], {"a": 1}, None])
def test_malformed_snapshots_are_refused(copied: object) -> None:
    with pytest.raises(ValueError, match="snapshot"):
        Metrics().absorb("1", copied)  # type: ignore[arg-type] # that is the point
