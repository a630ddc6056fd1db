"""Commented settings files that ``obdelta init`` writes, in the form that a deployment reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from obdelta.settings.setting import variable


@dataclass(frozen=True, slots=True)
class Line:
    """One setting of a new file. ``value`` None: commented out, with ``example`` as its value."""

    key: str
    comment: str
    value: str | None = None
    example: str = ""


def as_ini(lines: Sequence[Line]) -> str:
    """Returns a ``tap.conf``."""
    text = [
        "# Settings of obdelta. Check them: obdelta doctor. Run it: obdelta serve.",
        "# `obdelta settings` shows all settings with their values and defaults.",
        "[obdelta]",
    ]
    for line in lines:
        text += ["", *(f"# {part}" for part in line.comment.splitlines())]
        if line.value is None:
            text.append(f"#{line.key} = {line.example}")
        else:
            text.append(f"{line.key} = " + "\n    ".join(line.value.splitlines()))
    return "\n".join([*text, ""])


def as_environment(lines: Sequence[Line]) -> str:
    """Returns an environment file for Docker Compose."""
    text = [
        "# Settings of obdelta for openBalena's compose file: any OBDELTA_ variable.",
        "# After a change: docker compose up -d delta",
    ]
    for line in lines:
        text += ["", *(f"# {part}" for part in line.comment.splitlines())]
        name = variable(line.key)
        text.append(f"#{name}={line.example}" if line.value is None else f"{name}={line.value}")
    return "\n".join([*text, ""])


def as_helm_values(repository: str, tag: str) -> str:
    """Returns values for open-balena-helm, whose template sets all other settings."""
    return f"""\
# Values for open-balena-helm: obdelta in place of open-balena-delta. The chart's template sets the
# variables, volumes and certificates:
#
#     helm upgrade openbalena ./helm -n openbalena --reuse-values -f FILE
delta:
  enabled: true
  # Several replicas need a volume each and OBDELTA_SHARED.
  replicas: 1
  image:
    repository: {repository}
    tag: "{tag}"
    pullPolicy: IfNotPresent
  resources:
    requests: {{cpu: 500m, memory: 512Mi}}
    limits: {{memory: 3Gi}}
"""


OPTIONAL = (
    Line("store-quota", "Bytes for deltas and caches together.", example="20 GiB"),
    Line("max-builds", "Builds at the same time (default: one a core).", example="2"),
    Line("log-level", "debug, info, warn or error.", example="info"),
)
"""Settings that many operators change, commented out at the end of every file."""
COMPOSE = (
    Line("listen", "Plain HTTP behind haproxy, which has the certificate.", "tcp:80"),
    Line(
        "operator-listen",
        "The operators' page. The overlay publishes it on this machine's loopback address only.",
        "tcp:9100",
    ),
    Line(
        "upstream",
        "Directly to the registry's container. It redirects to https://s3.<domain>, whose\n"
        "certificate is signed by openBalena's authority or by a public one.",
        "http://registry",
    ),
    Line("upstream-ca", "openBalena's authority.", "/certs/root-ca.pem"),
    Line(
        "builder-token",
        "TOKEN_AUTH_BUILDER_TOKEN of the API: for `obdelta prepare` and publish = registry.",
    ),
    *OPTIONAL,
)
"""Settings of the compose overlay; everything else follows from its BALENA_TLD."""
