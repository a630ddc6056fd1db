"""The page of help: what each problem on the pages means, and what to do."""

from __future__ import annotations

from dataclasses import dataclass

from twisted.web.template import Tag, tags

from obdelta.web.operators.pages.markup import Piece, section


@dataclass(frozen=True, slots=True)
class Topic:
    """One subject. ``remedy`` is the first thing to do; ``docs`` names a page of the docs."""

    heading: str
    meaning: str
    remedy: str
    docs: str


CHECKS = {
    "upstream": Topic(
        "The upstream registry",
        "The registry of the setting upstream did not answer, or answered with a server error. "
        "Kept deltas are still served, if devices' tokens can be checked.",
        "Check whether the registry runs, and can be reached from this machine.",
        "upstream.md",
    ),
    "workers": Topic(
        "Build workers",
        "No worker process could be started. Nothing is built, and devices ask again later.",
        "Look for the reason in the log: usually memory has run out (dmesg), or a file of the "
        "installation is missing.",
        "operations.md",
    ),
    "store": Topic(
        "The store",
        "state-dir cannot be written, the disk is full, or deltas that must stay fill the quota.",
        "Free space on the disk of state-dir, or raise store-quota.",
        "state.md",
    ),
    "engine": Topic(
        "The build engine",
        "The balena-engine of the setting docker-host did not answer, and no other builder is set.",
        "Check whether the engine runs, or add native to the setting builder.",
        "publishing.md",
    ),
}
"""By the names of the readiness checks."""
TOPICS = {
    "certificate": Topic(
        "Certificates",
        "Devices refuse a certificate that has expired, and then get no update at all. A renewed "
        "file that cannot be used is not taken: the old certificate stays in force.",
        "Renew the certificate. The server reads its file again by itself.",
        "settings.md",
    ),
    "key": Topic(
        "The key of tokens",
        "The file of auth-key has the public key with which the server checks devices' tokens. If "
        "it is removed or broken while the server runs, the old key stays in force. When the API "
        "gets a new key, all devices are then refused.",
        "Restore the file: the API's certificate or public key, readable for the server's user.",
        "access.md",
    ),
    "passwords": Topic(
        "Operators' passwords",
        "The file of operator-passwords is removed, unreadable or broken. No one can log in, as a "
        "user who was removed must not stay known. Commands that can read state-dir still act.",
        "Repair the file: one line of obdelta password for each user, readable for the server's "
        "user, and not writable for everyone.",
        "operators.md",
    ),
    "quota": Topic(
        "The quota",
        "All content together may take store-quota. What devices are pulling, or pulled within "
        "keep-served, stays above it.",
        "If this lasts, raise store-quota, or free space with obdelta gc.",
        "operations.md",
    ),
    "fleet": Topic(
        "The fleet",
        "openBalena's API of the setting api-url did not answer, or refused api-token. Deltas of "
        "new releases are then built when the first device asks for them.",
        "Check api-url, and give api-token a new value if it has expired.",
        "fleet.md",
    ),
    "replicas": Topic(
        "Redis and workers",
        "Redis of the setting shared did not answer, or no obdelta worker is alive. Without Redis "
        "each replica builds alone; with builds = workers, builds wait.",
        "Check whether Redis runs, and can be reached from here. Start obdelta worker.",
        "scaling.md",
    ),
    "skipped": Topic(
        "Skipped pairs",
        "The two images have too little in common, or one of them cannot have a delta. Devices "
        "pull the target in full. This is a normal result, and no failure.",
        "Nothing. obdelta explain says what made a delta large.",
        "operators.md",
    ),
    "refused": Topic(
        "Refused clients",
        "Their token was refused, or the image that they asked for is not there for them.",
        "obdelta trace CLIENT shows their last requests, and obdelta check tries a token.",
        "access.md",
    ),
    "acting": Topic(
        "Acting",
        "Builds are retried, cancelled and forgotten, and deltas dropped, by those who may act. "
        "Browsers may not until a setting says who.",
        "Set operator-passwords, or operator-proxy where a proxy checks logins. Commands that can "
        "read state-dir need neither.",
        "operators.md",
    ),
}


def content() -> list[Tag]:
    """Returns the page below its heading bar."""
    return [
        tags.h1("Help"),
        tags.p("What the pages display, and what to do.", class_="lead"),
        *(_topic(name, topic) for name, topic in (CHECKS | TOPICS).items()),
    ]


def _topic(name: str, topic: Topic) -> Tag:
    more: list[Piece] = ["More in the documentation: ", tags.code(topic.docs)]
    return section(name, topic.heading, tags.p(topic.meaning), tags.p(topic.remedy), tags.p(*more))
