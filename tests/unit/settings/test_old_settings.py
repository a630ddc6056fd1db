"""Keys of earlier versions: the server still starts with each, and logs one line that says what to
do.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from obdelta.app.access import make_policy
from obdelta.app.builders import engine_target
from obdelta.errors import SettingsError
from obdelta.settings import Settings, old_keys, read, table
from obdelta.settings.schema import UNUSED
from tests.support.commands import run
from tests.support.server import command, running_server
from tests.unit.settings.test_settings import NEEDED, write

RENAMED = {"hold": "request-timeout", "grace": "keep-served", "worth": "max-delta-ratio"}


def given(tmp_path: Path, source: str, key: str, value: str) -> Settings:
    """Returns settings, one of which comes from an option, the environment or the file."""
    variable = "OBDELTA_" + key.upper().replace("-", "_")
    return read(
        NEEDED | ({key: value} if source == "option" else {}),
        {variable: value} if source == "environment" else {},
        write(tmp_path, f"[obdelta]\n{key} = {value}\n") if source == "file" else None,
    )


NAMES = {
    "option": ("--{}", "the command line"),
    "environment": ("OBDELTA_{}", "the environment"),
    "file": ("{}", "tap.conf"),
}


def name_in(source: str, key: str) -> str:
    shown = key.upper().replace("-", "_") if source == "environment" else key
    return NAMES[source][0].format(shown)


def test_renamed_settings_are_listed() -> None:
    assert {row.old_key: row.key for row in table() if row.old_key} == RENAMED


@pytest.mark.parametrize("source", NAMES)
@pytest.mark.parametrize("old", RENAMED)
def test_an_old_name_works_with_a_notice(tmp_path: Path, source: str, old: str) -> None:
    new = RENAMED[old]
    settings = given(tmp_path, source, old, "7")
    assert getattr(settings, new.replace("-", "_")) == 7
    assert settings == given(tmp_path, source, new, "7")
    assert settings.origins[new] == (
        f"environment {name_in(source, old)}" if source == "environment" else source
    )
    assert settings.notices == (
        f"setting {name_in(source, old)} is now {name_in(source, new)}: the old name still works:"
        f" rename it in {NAMES[source][1]}",
    )
    assert given(tmp_path, source, new, "7").notices == ()


@pytest.mark.parametrize("old", RENAMED)
def test_a_bad_value_of_an_old_name_is_an_error_of_the_new_one(tmp_path: Path, old: str) -> None:
    with pytest.raises(
        SettingsError, match=f"setting {RENAMED[old]} has the value 'x': .*tap.conf:2"
    ):
        given(tmp_path, "file", old, "x")


@pytest.mark.parametrize("old", RENAMED)
def test_both_names_are_an_error_that_names_both(tmp_path: Path, old: str) -> None:
    new = RENAMED[old]
    variable = "OBDELTA_" + old.upper()
    message = (
        f"setting {old} has the value '3': expected only {new}, its new name, which is also given"
        rf" \({old} from environment {variable}, {new} from file\)"
    )
    with pytest.raises(SettingsError, match=message):
        read(NEEDED, {variable: "3"}, write(tmp_path, f"[obdelta]\n{new} = 3\n"))
    with pytest.raises(SettingsError, match=f"only {new}"):
        read(NEEDED | {old: "3", new: "3"}, {})
    # An empty value counts as not given.
    assert read(NEEDED | {old: "", new: "3"}, {}) == read(NEEDED | {new: "3"}, {})


@pytest.mark.parametrize("source", NAMES)
@pytest.mark.parametrize("key", UNUSED)
@pytest.mark.parametrize("value", ["5 GiB", "7", "neither"])
def test_a_removed_key_is_named_and_ignored(
    tmp_path: Path, source: str, key: str, value: str
) -> None:
    settings = given(tmp_path, source, key, value)
    assert settings == read(NEEDED, {})
    (notice,) = settings.notices
    assert notice == (
        f"setting {name_in(source, key)} is no longer used: {UNUSED[key]}: remove it from"
        f" {NAMES[source][1]}"
    )


def test_old_cache_settings_have_a_notice(tmp_path: Path) -> None:
    assert given(tmp_path, "file", "layer-cache", "1 GiB").notices == (
        "setting layer-cache is no longer used: caches share store-quota: remove it from tap.conf",
    )


@pytest.mark.parametrize(
    ("key", "value", "field", "used"),
    [
        ("auth-service", "registry.other.example", "auth_service", "registry.other.example"),
        ("v2-streaming", "never", "v2_streaming", "never"),
        ("v2-url-lifetime", "1 d", "v2_url_lifetime", 86400),
        ("docker-tls-verify", "1", "docker_tls_verify", True),
        ("max-queued-builds", "7", "max_queued_builds", 7),
        ("max-builder-requests", "0", "max_builder_requests", 0),
        ("v2-full-pull", "no", "v2_full_pull", False),
        ("upstream-basic", "yes", "upstream_basic", True),
        ("jwt-algorithm", "RS256, ES256", "jwt_algorithm", ("RS256", "ES256")),
        ("proxy-protocol", "yes", "proxy_protocol", True),
        ("shared-ca", "/etc/redis.pem", "shared_ca", Path("/etc/redis.pem")),
        ("docker-cert-path", "/etc/engine", "docker_cert_path", Path("/etc/engine")),
        ("publish-host", "registry2.example.com", "publish_host", "registry2.example.com"),
    ],
)
@pytest.mark.parametrize("source", NAMES)
def test_a_superseded_value_is_still_used(
    tmp_path: Path, source: str, key: str, value: str, field: str, used: object
) -> None:
    settings = given(tmp_path, source, key, value)
    assert getattr(settings, field) == used != getattr(read(NEEDED, {}), field)
    (notice,) = settings.notices
    assert notice.startswith(f"setting {name_in(source, key)} is no longer needed: ")
    assert notice.endswith(
        f": its value is still used: remove it from {NAMES[source][1]} unless you depend on it"
    )


@pytest.mark.parametrize(("requests", "quarter"), [("64", 16), ("5", 2), ("1", 1), ("0", 16)])
def test_limits_of_builds_follow_from_that_of_requests(requests: str, quarter: int) -> None:
    settings = read(NEEDED | {"max-requests": requests}, {})
    assert (settings.max_queued_builds, settings.max_builder_requests) == (quarter, quarter)


def test_the_service_follows_from_the_audience() -> None:
    audiences = {"auth-audience": "registry2.example.com, other.example.com"}
    assert read(NEEDED | audiences, {}).auth_service == "registry2.example.com"
    assert read(NEEDED, {}).auth_service is None


def test_the_password_goes_to_the_upstream_itself_only_where_that_is_set() -> None:
    token = {"TOKEN_AUTH_BUILDER_TOKEN": "secret"}
    for given, basic in (("device", False), ("builder", False), ("none", False), ("basic", True)):
        settings = read(NEEDED | {"upstream-credentials": given}, token)
        assert settings.upstream_basic is basic
    with pytest.raises(SettingsError, match="builder-token"):
        read(NEEDED | {"upstream-credentials": "basic"}, {})
    before = read(NEEDED | {"upstream-credentials": "builder", "upstream-basic": "yes"}, token)
    after = read(NEEDED | {"upstream-credentials": "basic"}, token)
    assert make_policy(before) == make_policy(after)


def test_the_proxy_protocol_follows_from_the_proxies() -> None:
    usual = read(NEEDED, {})
    assert not usual.proxy_protocol and "10.0.0.0/8" in usual.proxy_from.networks
    alone = read(NEEDED | {"proxy-from": "proxy-protocol"}, {})
    assert alone.proxy_protocol and alone.proxy_from.networks == usual.proxy_from.networks
    one = read(NEEDED | {"proxy-from": "proxy-protocol 192.0.2.1"}, {})
    assert one.proxy_protocol and one.proxy_from.networks == ("192.0.2.1",)
    before = read(NEEDED | {"proxy-from": "192.0.2.1", "proxy-protocol": "yes"}, {})
    assert before.proxy_protocol and before.proxy_from.networks == ("192.0.2.1",)
    for wrong in ("192.0.2.1 proxy-protocol", "proxy", "yes"):
        with pytest.raises(SettingsError, match="proxy-from"):
            read(NEEDED | {"proxy-from": wrong}, {})


def test_the_authority_of_redis_is_in_its_url() -> None:
    def authority(url: str) -> Path | None:
        return read(NEEDED, {"OBDELTA_SHARED": url}).shared_ca

    assert authority("rediss://redis:6379/0") is None
    assert authority("rediss://redis?ssl_ca_certs=/etc/a%20b.pem") == Path("/etc/a b.pem")
    for wrong in (
        "redis://redis?ssl_ca_certs=/a",
        "rediss://redis?ssl_cert_reqs=none",
        "rediss://redis?ssl_ca_certs=",
        "rediss://redis?ssl_ca_certs=/a&x=y",
    ):
        with pytest.raises(SettingsError, match="shared"):
            authority(wrong)


def test_the_registrys_host_for_devices_follows_from_the_hosts_that_they_name() -> None:
    def host(environment: dict[str, str], **options: str) -> str | None:
        given = NEEDED | {key.replace("_", "-"): value for key, value in options.items()}
        return read(given, environment).publish_host

    assert host({}) == "registry.example.com"
    assert host({"REGISTRY_HOST": "registry2.example.com"}) == "registry2.example.com"
    internal = {"upstream": "http://registry:5000"}
    assert host({}, **internal) == "registry:5000"
    assert host({}, **internal, registry_hosts="r2.example.com r1.example.com") == "r1.example.com"
    assert host({}, **internal, registry_hosts="a.example.com registry:5000") == "registry:5000"
    assert host({}, upstream="oci:/images") is None


def test_dockers_own_variable_turns_on_tls_without_a_notice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = tmp_path / ".docker"
    folder.mkdir()
    for name in ("ca.pem", "cert.pem", "key.pem"):
        (folder / name).touch()
    over_unix = NEEDED | {"builder": "balena-engine"}
    over_tcp = over_unix | {"docker-host": "tcp://engine:2376"}
    settings = read(over_tcp, {"DOCKER_TLS_VERIFY": "1"})
    found = engine_target(settings)
    assert found is not None and found[1] is not None and found[1].ca == folder / "ca.pem"
    assert settings.notices == ()
    host = found[0]
    assert engine_target(read(over_tcp, {})) == (host, None)
    assert engine_target(read(over_tcp, {"DOCKER_TLS_VERIFY": "0"})) == (host, None)
    assert engine_target(read(over_tcp | {"docker-tls-verify": "1"}, {})) == found
    without = read(over_unix, {"DOCKER_TLS_VERIFY": "1"})
    assert without.docker_cert_path is None and engine_target(without) == (host, None)
    assert engine_target(read(NEEDED, {})) is None


def test_commands_print_the_notices_on_stderr(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BALENA_TLD", "example.com")
    monkeypatch.setenv("OBDELTA_AUTH_SERVICE", "special")
    monkeypatch.setenv("OBDELTA_TREE_CACHE", "1 GiB")
    file = write(tmp_path, "[obdelta]\nhold = 30\n")
    ran = run("settings", "--config", file, "--worth", "0.5")
    lines = ran.stderr.decode().splitlines()
    assert len(lines) == 4 and all(line.startswith("obdelta: setting ") for line in lines)
    text = ran.stdout.decode()
    assert "# file\nrequest-timeout = 30\n" in text
    assert "# option\nmax-delta-ratio = 0.5\n" in text
    assert "# environment OBDELTA_AUTH_SERVICE\nauth-service = special\n" in text
    assert "tree-cache" not in text and "v2-streaming" not in text
    # The printed settings give the same values.
    (tmp_path / "printed.conf").write_text(text)
    before = read({"max-delta-ratio": "0.5"}, os.environ, file)
    monkeypatch.delenv("OBDELTA_AUTH_SERVICE")
    assert read({}, os.environ, tmp_path / "printed.conf") == before


def test_help_texts_do_not_mention_old_keys() -> None:
    usage = run("settings", "--help-settings").stdout.decode()
    assert "--request-timeout" in usage
    assert not any(f"--{key} " in usage for key in old_keys())


def test_a_server_with_every_old_key_starts_and_logs_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # a directory without a tap.conf that gives the new names
    options: dict[str, Any] = {key.replace("-", "_"): "1" for key in UNUSED}
    options |= {"hold": "30", "v2_streaming": "never"}
    with running_server(
        tmp_path / "state",
        upstream=f"oci:{tmp_path}",
        environment={"OBDELTA_GRACE": "1 h"},
        **options,
    ) as server:
        log = server.log
    for key in UNUSED:
        assert log.count(f"setting --{key} is no longer used: {UNUSED[key]}: remove it") == 1
    assert log.count("setting --hold is now --request-timeout: ") == 1
    assert log.count("setting OBDELTA_GRACE is now OBDELTA_KEEP_SERVED: ") == 1
    assert log.count("setting --v2-streaming is no longer needed: ") == 1


def test_a_server_with_both_names_does_not_start(tmp_path: Path) -> None:
    needed = [f"--{key}={value}" for key, value in NEEDED.items()]
    ran = subprocess.run(
        command(*needed, "--auth=none", "--hold=1", "--request-timeout=1"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 2
    assert ran.stderr.startswith("obdelta: setting hold has the value '1': expected only")
    assert "request-timeout, its new name" in ran.stderr
