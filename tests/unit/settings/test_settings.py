"""Settings: which source wins, which values follow from openBalena's environment, and which errors
stop a start, in which words.
"""

from __future__ import annotations

import itertools
import os
import subprocess
from pathlib import Path

import pytest

from obdelta.concurrency.cores import available_cores
from obdelta.errors import SettingsError
from obdelta.settings import OciLayouts, RegistryUrl, read, table
from tests.support.commands import OBDELTA

NEEDED = {"upstream": "https://registry.example.com", "public-url": "https://delta.example.com"}


def write(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "tap.conf"
    file.write_text(text)
    return file


def test_defaults_have_their_values() -> None:
    settings = read(NEEDED, {})
    assert settings.listen == ("tcp:8080",)
    assert settings.upstream == RegistryUrl("https://registry.example.com", "registry.example.com")
    assert settings.upstream_ca is None
    assert settings.registry_hosts == {"registry.example.com"}
    assert settings.public_url == "https://delta.example.com"
    assert settings.state_dir == Path("/var/lib/obdelta")
    assert settings.upstream_credentials == "device"
    assert settings.auth == "token"
    assert settings.request_timeout == 45
    assert settings.max_builds == available_cores()
    assert settings.max_delta_ratio == 0.9
    assert settings.effort == "balanced"
    assert settings.device_link == 500_000
    assert settings.store_quota == 20 << 30
    assert settings.keep_served == 86400
    assert settings.worker_memory == 1 << 30
    assert settings.build_timeout == 1800


@pytest.mark.parametrize("sources", list(itertools.product([False, True], repeat=3)))
def test_option_beats_environment_beats_file_beats_default(
    tmp_path: Path, sources: tuple[bool, bool, bool]
) -> None:
    option, environment, file = sources
    settings = read(
        NEEDED | ({"request-timeout": "1"} if option else {"request-timeout": None}),
        {"OBDELTA_REQUEST_TIMEOUT": "2"} if environment else {},
        write(tmp_path, "[obdelta]\n" + ("request-timeout = 3\n" if file else "")),
    )
    wanted, origin = next(
        found
        for given_there, found in [
            (option, (1, "option")),
            (environment, (2, "environment OBDELTA_REQUEST_TIMEOUT")),
            (file, (3, "file")),
            (True, (45, "default")),
        ]
        if given_there
    )
    assert settings.request_timeout == wanted
    assert settings.origins["request-timeout"] == origin


def test_derived_values_are_weaker_than_the_file(tmp_path: Path) -> None:
    file = write(tmp_path, "[obdelta]\nupstream = https://mine.example.com\n")
    settings = read({}, {"BALENA_TLD": "example.com", "REGISTRY_HOST": "r.example.com"}, file)
    assert settings.upstream == RegistryUrl("https://mine.example.com", "mine.example.com")
    assert settings.registry_hosts == {
        "mine.example.com",
        "r.example.com",
        "registry.example.com",
        "registry2.example.com",
    }


@pytest.mark.parametrize(
    ("environment", "upstream", "public_url", "hosts"),
    [
        (
            {"BALENA_TLD": "Example.com"},
            "https://registry2.example.com",
            "https://delta.example.com",
            {"registry.example.com", "registry2.example.com"},
        ),
        (
            {
                "BALENA_TLD": "example.com",
                "REGISTRY_HOST": "registry.example.com:5000",
                "DELTA_HOST": "d.example.org",
            },
            "https://registry.example.com:5000",
            "https://d.example.org",
            {"registry.example.com:5000", "registry.example.com", "registry2.example.com"},
        ),
        (
            {"REGISTRY_HOST": "registry.example.com:443", "DELTA_HOST": "delta.example.com:8443"},
            "https://registry.example.com:443",
            "https://delta.example.com:8443",
            {"registry.example.com", "registry.example.com:443"},
        ),
        (
            {
                "BALENA_TLD": "example.com",
                "OBDELTA_UPSTREAM": "http://registry:80",
                "OBDELTA_PUBLIC_URL": "http://d:80/",
            },
            "http://registry:80",
            "http://d:80",
            {"registry", "registry.example.com", "registry2.example.com"},
        ),
    ],
)
def test_settings_follow_from_openbalenas_environment(
    environment: dict[str, str], upstream: str, public_url: str, hosts: set[str]
) -> None:
    settings = read({}, environment)
    assert isinstance(settings.upstream, RegistryUrl)
    assert settings.upstream.url == upstream
    assert settings.public_url == public_url
    assert settings.registry_hosts == hosts


def test_a_layout_upstream_speaks_for_the_public_host(tmp_path: Path) -> None:
    settings = read({"upstream": f"oci:{tmp_path}", "public-url": "http://127.0.0.1:8080"}, {})
    assert settings.upstream == OciLayouts(tmp_path)
    assert settings.registry_hosts == {"127.0.0.1:8080"}


@pytest.mark.parametrize(
    ("url", "host"),
    [
        ("https://delta.example.com", "delta.example.com"),
        ("https://delta.example.com:443", "delta.example.com"),
        ("http://delta.example.com:443", "delta.example.com:443"),
        ("http://Delta.example.com:80/", "delta.example.com"),
        ("http://127.0.0.1:8080", "127.0.0.1:8080"),
        ("https://[::1]:8443", "[::1]:8443"),
        ("https://[::1]", "[::1]"),
    ],
)
def test_the_public_host_follows_from_the_url(url: str, host: str) -> None:
    assert read(NEEDED | {"public-url": url}, {}).public_host == host


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("upstream", "registry.example.com"),
        ("upstream", "ftp://registry.example.com"),
        ("upstream", "https://user:password@registry.example.com"),
        ("upstream", "https://registry.example.com/path"),
        ("upstream", "https://registry.example.com?x"),
        ("upstream", "https://registry.example.com:99999"),
        ("upstream", "https://"),
        ("upstream", "oci:"),
        ("public-url", "delta.example.com"),
        ("public-url", "https://delta.example.com/api"),
        ("public-url", "https://a\nb"),
        ("registry-hosts", "registry.example.com/v2"),
        ("registry-hosts", "https://registry.example.com"),
        ("registry-hosts", ","),
        ("upstream-credentials", "Builder"),
        ("auth", "off"),
        ("request-timeout", "soon"),
        ("request-timeout", "-1"),
        ("request-timeout", "nan"),
        ("request-timeout", "45 parsecs"),
        ("max-builds", "0"),
        ("max-builds", "2.5"),
        ("max-delta-ratio", "nan"),
        ("max-delta-ratio", "-0.1"),
        ("max-delta-ratio", "11"),
        ("effort", "most"),
        ("device-link", "0"),
        ("device-link", "0.5"),
        ("device-link", "0 Mbit/s"),
        ("device-link", "100 Gbit/s"),
        ("device-link", "1 MB/s"),
        ("device-link", "-1 Mbit/s"),
        ("device-link", "nan Mbit/s"),
        ("device-link", "Metered"),
        ("store-quota", "lots"),
        ("store-quota", "10 GiBs"),
        ("store-quota", "-1"),
        ("worker-memory", "1e9"),
        ("build-timeout", ""),
        ("log-level", "loud"),
        ("log-level", "info, registrie=debug"),
        ("log-level", "info, registry=loud"),
        ("log-level", "info warn"),
        ("log-level", "registry="),
        ("log-format", "xml"),
    ],
)
def test_a_bad_value_is_named_with_what_is_expected(key: str, value: str) -> None:
    if not value:  # an empty value counts as not given
        assert read(NEEDED | {key: value}, {}) == read(NEEDED, {})
        return
    with pytest.raises(SettingsError) as failure:
        read(NEEDED | {key: value}, {})
    message = str(failure.value)
    row = next(row for row in table() if row.key == key)
    assert "\n" not in message
    shown = value.replace("user:password@", "…@")  # a login is not repeated
    assert message.startswith(f"setting {key} has the value {shown!r}: expected {row.expected}")
    assert failure.value.key == key


def test_every_source_is_named_when_its_value_is_bad(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"\(from environment OBDELTA_REQUEST_TIMEOUT\)$"):
        read(NEEDED, {"OBDELTA_REQUEST_TIMEOUT": "x"})
    with pytest.raises(SettingsError, match=r"\(from \S+/tap\.conf:2\)$"):
        read(NEEDED, {}, write(tmp_path, "[obdelta]\nrequest-timeout = x\n"))
    with pytest.raises(SettingsError, match=r"setting upstream .*'https://a/b'.*\(from derived\)$"):
        read({"public-url": "http://x"}, {"REGISTRY_HOST": "a/b"})


def test_a_default_that_follows_from_a_wrong_value_is_no_second_error() -> None:
    with pytest.raises(SettingsError) as failure:
        read({"upstream": "oci:", "public-url": "https://a/b"}, {"DELTA_HOST": "d/e"})
    assert [error.key for error in failure.value.each] == ["upstream", "public-url"]
    assert str(failure.value) == "; ".join(map(str, failure.value.each))


def test_the_line_of_an_old_key_is_named(tmp_path: Path) -> None:
    file = write(tmp_path, "[obdelta]\n# comment\n\nlisten = tcp:1\n    tcp:2\nhold = soon\n")
    with pytest.raises(SettingsError, match=rf"request-timeout .*\(from {file}:6\)$"):
        read(NEEDED, {}, file)


def test_unknown_keys_are_named() -> None:
    with pytest.raises(
        SettingsError,
        match=r"setting OBDELTA_EFORT has the value '3': .*did you mean OBDELTA_EFFORT\?",
    ):
        read(NEEDED, {"OBDELTA_EFORT": "3"})
    with pytest.raises(
        SettingsError, match=r"setting efort has the value '3': .*did you mean effort\?"
    ):
        read(NEEDED | {"efort": "3"}, {})
    assert read(NEEDED, {"OBDELTA_CONFIG": "tap.conf", "OTHER": "x"}) == read(NEEDED, {})


SERVICE_LINKS = {
    "OBDELTA_SERVICE_HOST": "10.96.0.12",
    "OBDELTA_SERVICE_PORT": "80",
    "OBDELTA_SERVICE_PORT_HTTP": "80",
    "OBDELTA_PORT": "tcp://10.96.0.12:80",
    "OBDELTA_PORT_80_TCP": "tcp://10.96.0.12:80",
    "OBDELTA_PORT_80_TCP_PROTO": "tcp",
    "OBDELTA_PORT_80_TCP_PORT": "80",
    "OBDELTA_PORT_80_TCP_ADDR": "10.96.0.12",
    "OBDELTA_PORT_53_UDP": "udp://[fd00::1]:53",
    "OBDELTA_OPERATOR_SERVICE_HOST": "fd00::1",
    "OBDELTA_OPERATOR_SERVICE_PORT_OPERATOR": "9100",
    "OBDELTA_OPERATOR_PORT_9100_TCP_ADDR": "fd00::1",
}
"""Returns the variables that Kubernetes sets in every pod for the services of deploy/kubernetes."""


def test_service_links_of_kubernetes_are_no_settings() -> None:
    assert read(NEEDED, SERVICE_LINKS) == read(NEEDED, {})
    ran = subprocess.run(
        [*OBDELTA, "settings", "--upstream", "oci:/x", "--public-url", "http://x"],
        env={**os.environ, **SERVICE_LINKS},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0 and "oci:/x" in ran.stdout, ran.stderr


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("OBDELTA_PORT", "8080"),
        ("OBDELTA_SERVICE_HOST", "delta.example.com"),
        ("OBDELTA_SERVICE_PORT", "http"),
        ("OBDELTA_PORT_80_TCP", "80"),
        ("OBDELTA_LISTEN_PORT", "443"),
        ("OBDELTA_REQUEST_TIMEOUT_ADDR", "10.0.0.1"),
    ],
)
def test_a_key_that_resembles_a_service_link_is_named(name: str, value: str) -> None:
    with pytest.raises(SettingsError, match=rf"^setting {name} has the value"):
        read(NEEDED, {name: value})


@pytest.mark.parametrize("missing", ["upstream", "public-url"])
def test_a_missing_required_key_is_named_with_how_to_give_it(missing: str) -> None:
    variable = "OBDELTA_" + missing.upper().replace("-", "_")
    with pytest.raises(
        SettingsError, match=rf"^setting {missing} is missing: expected .* or {variable}$"
    ):
        read({key: value for key, value in NEEDED.items() if key != missing}, {})
    assert read(
        {key: value for key, value in NEEDED.items() if key != missing}, {}, fallbacks=NEEDED
    )


def test_the_builder_needs_its_token() -> None:
    with pytest.raises(
        SettingsError, match=r"^setting builder-token is missing: .*TOKEN_AUTH_BUILDER_TOKEN"
    ):
        read(NEEDED | {"upstream-credentials": "builder"}, {})
    settings = read(
        NEEDED | {"upstream-credentials": "builder"}, {"TOKEN_AUTH_BUILDER_TOKEN": "open sesame"}
    )
    assert settings.builder_token == "open sesame"
    both = {"TOKEN_AUTH_BUILDER_TOKEN": "a", "OBDELTA_BUILDER_TOKEN": "b"}
    assert read(NEEDED | {"upstream-credentials": "builder"}, both).builder_token == "b"


def test_secrets_are_not_displayed() -> None:
    settings = read(NEEDED, {"TOKEN_AUTH_BUILDER_TOKEN": "open sesame"})
    assert "sesame" not in repr(settings)
    assert "sesame" not in repr(settings.texts)
    with pytest.raises(SettingsError) as failure:
        read(NEEDED, {"TOKEN_AUTH_BUILDER_TOKEN": "open\nsesame"})
    assert "sesame" not in str(failure.value)
    with pytest.raises(SettingsError) as failure:
        read(
            NEEDED, {"OBDELTA_BUILDER_TOKN": "open sesame"}
        )  # a typing error must not reveal it either
    assert "sesame" not in str(failure.value)
