"""A container started exactly as open-balena-helm's template starts open-balena-delta, but with our
image.

The template is not ours to ship. Below are the variables, volumes, port, privileges and hook that
it sets (chart 2.0.5). Docker replaces Kubernetes: emptyDir volumes are directories that every user
may write, the Secret is a directory with its key as a file, and the hook runs in the started
container, as kubelet runs it, so it comes late.

The registry is a real one with token authentication, behind a real haproxy with TLS at
registry.<domain>:443. Its certificate would be a public one; here, a bundle with the test's
authority is mounted over the image's.
"""

from __future__ import annotations

import shutil
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from bench.images import push
from bench.rsync_device import apply, root_filesystem
from obdelta.rsync import proof
from tests.support import haproxy
from tests.support.commands import run
from tests.support.image import AUTHORITIES, BuiltImage, Container, Network, container, network
from tests.support.images import BASE_REPOSITORY, TARGET_REPOSITORY, Pair, make_pair
from tests.support.registry import running_token_registry
from tests.support.server import free_port
from tests.support.tokens import Issuer, make_certificate, make_key, private_pem, pulls

pytestmark = pytest.mark.timeout(900)  # whichever test comes first may wait for the build

TLD = "example.com"
REGISTRY = f"registry.{TLD}"
HOOK = f"mkdir /certs/private; ln -s /certs/api/certificate /certs/private/api.{TLD}.pem;"
ENVIRONMENT = {
    "BALENA_TLD": TLD,
    "REGISTRY_HOST": REGISTRY,
    "DOCKER_HOST": "unix:///var/run/docker.sock",
    "DOCKER_BUILDKIT": "0",
    "TOKEN_AUTH_BUILDER_TOKEN": "the-builders-secret",
    "JWT_ALGO": "ES256",
}
PRIVILEGES = ("--privileged", "--cap-add=SYS_ADMIN", "--cap-add=SYS_RESOURCE")


@dataclass(frozen=True)
class Stack:
    """The container's surroundings; ``token`` is a device's, for both repositories."""

    pair: Pair
    bridge: Network
    folder: Path
    token: str

    @property
    def token_file(self) -> Path:
        """Writes a file with the token, as commands read it."""
        path = self.folder / "token"
        path.write_text(self.token)
        return path


@pytest.fixture(scope="module")
def stack(built_image: BuiltImage, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    folder = tmp_path_factory.mktemp("stack")
    pair = make_pair(folder, size=1 << 20)
    issuer = Issuer(issuer=f"api.{TLD}", audience=REGISTRY)
    certificates = folder / "secret"
    certificates.mkdir()
    (certificates / "certificate").write_bytes(issuer.certificate)
    key = make_key("ES256")
    own = make_certificate(key, REGISTRY)
    (folder / "registry.pem").write_bytes(own + private_pem(key))
    (folder / "authorities.crt").write_bytes(Path(AUTHORITIES).read_bytes() + own)
    with (
        running_token_registry(folder / "registry", issuer) as registry,
        network(built_image.engine) as bridge,
    ):
        assert registry.tokens is not None
        for image, repository in ((pair.base, BASE_REPOSITORY), (pair.target, TARGET_REPOSITORY)):
            push(
                image,
                registry.url,
                repository,
                authorization=registry.tokens.push_authorization(repository),
            )
        port = free_port()
        config = f"""\
defaults
	mode http
	timeout client 63s
	timeout server 63s
	timeout connect 5s
frontend https
	bind {bridge.gateway}:443 ssl crt {folder / "registry.pem"}
	bind 127.0.0.1:{port}
	default_backend registry
backend registry
	server registry {registry.host}
"""
        with haproxy.running(config, folder, port):
            yield Stack(
                pair, bridge, folder, issuer.token(pulls(BASE_REPOSITORY, TARGET_REPOSITORY))
            )


@pytest.fixture(scope="module", params=["privileged", "unprivileged"])
def delta(
    request: pytest.FixtureRequest, built_image: BuiltImage, stack: Stack
) -> Iterator[Container]:
    """Yields the chart's container after its hook has run; with ``privileged`` and without."""
    volumes = {"balena-engine": "/var/lib/balena-engine", "delta-rsync": "/delta-rsync"}
    for name in volumes:
        (stack.folder / request.param / name).mkdir(parents=True, mode=0o777)
        (stack.folder / request.param / name).chmod(0o777)
    options = [
        f"--network={stack.bridge.name}",
        # The cluster's DNS.
        f"--add-host={REGISTRY}:{stack.bridge.gateway}",
        *(PRIVILEGES if request.param == "privileged" else ()),
        # Kubernetes' runtimes reserve low ports for root, and Docker does not: the harder case is
        # tested.
        "--sysctl=net.ipv4.ip_unprivileged_port_start=1024",
        *(f"--env={name}={value}" for name, value in ENVIRONMENT.items()),
        *(
            f"--volume={stack.folder / request.param / name}:{path}"
            for name, path in volumes.items()
        ),
        f"--volume={stack.folder / 'secret'}:/certs/api:ro",
        f"--volume={stack.folder / 'authorities.crt'}:{AUTHORITIES}:ro",
    ]
    with container(built_image, options) as running:
        # mkdir may find that the directory exists; kubelet checks only the status of the whole
        # hook.
        hooked = built_image.engine.run("exec", running.id, "sh", "-c", HOOK)
        assert hooked.returncode == 0, hooked.stderr
        running.wait_for_log(r"devices: listening on http://\S+:80\b")
        yield running
        assert "Traceback" not in running.log
        assert running.stop() == 0


def image(repository: str) -> str:
    return f"{REGISTRY}/{repository}"


def test_a_v3_delta_is_built_pulled_and_applied(delta: Container, stack: Stack) -> None:
    """Updates by the device of `obdelta check`; the ingress would lead its names to these ports."""
    url = f"http://{delta.address}:80"
    ran = run(
        "check",
        image(BASE_REPOSITORY),
        image(TARGET_REPOSITORY),
        "--server",
        url,
        "--registry",
        url,
        "--token",
        f"@{stack.token_file}",
        "--require-delta",
    )
    assert ran.stdout.startswith(b"verified: ")
    assert str(stack.pair.target.image_id).encode() in ran.stdout


def test_a_v2_delta_is_built_downloaded_and_applied(
    delta: Container, stack: Stack, tmp_path: Path
) -> None:
    to_delta = urllib.request.Request(
        f"http://{delta.address}/api/v2/delta?src={image(BASE_REPOSITORY)}&dest={image(TARGET_REPOSITORY)}&wait=true",
        headers={
            "Authorization": f"Bearer {stack.token}",
            "User-Agent": "Supervisor/14.9.4 (Linux)",
        },
    )
    with pytest.raises(urllib.error.HTTPError) as redirected:
        urllib.request.urlopen(to_delta, timeout=60)
    assert redirected.value.code == 300, redirected.value.read()
    location = redirected.value.headers["location"]
    redirected.value.close()
    public = f"https://delta.{TLD}"
    assert location.startswith(f"{public}/")
    base, target = (
        root_filesystem(each, tmp_path / name)
        for name, each in (("base", stack.pair.base), ("target", stack.pair.target))
    )
    with (
        urllib.request.urlopen(
            location.replace(public, f"http://{delta.address}"), timeout=60
        ) as answer,
        (tmp_path / "stream").open("wb") as out,
    ):
        shutil.copyfileobj(answer, out)
    device = tmp_path / "device"
    proof.copy_for_proof(base, target, device)
    apply(tmp_path / "stream", stack.pair.target, device)
    proof.check_result(device, target)


def test_clients_without_a_token_get_nothing(delta: Container) -> None:
    for path in (
        "/v2/",
        f"/api/v3/delta?src={image(BASE_REPOSITORY)}&dest={image(TARGET_REPOSITORY)}",
    ):
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(f"http://{delta.address}{path}", timeout=10)
        with refused.value as error:
            assert error.code == 401
            assert f'realm="https://api.{TLD}/auth/v1/token"' in error.headers["www-authenticate"]


def test_it_runs_unprivileged_and_keeps_its_state_in_the_volume(
    delta: Container, stack: Stack
) -> None:
    assert delta.execute("id", "-u").strip() == "10001"
    kept = [
        path
        for path in stack.folder.glob("*/*/obdelta/catalogue.sqlite")
        if path.stat().st_uid == 10001
    ]
    assert kept
