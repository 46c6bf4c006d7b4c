"""Rules for container images, and which Ray version a tag tells. Used by the pod and cluster rules. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from penstock.cluster.validate.findings import Path, Problem
from penstock.cluster.validate.quantities import Version, version

_NAME = re.compile(r"[a-z0-9]+(?:[._/-]+[a-z0-9]+)*")
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_RAY_IN_TAG = re.compile(r"(?:^|-)ray-?(?=[0-9])")
_PYTHON_IN_TAG = re.compile(r"-(py3[0-9]+)(?:-|$)")
FLOATING = frozenset({"latest", "nightly", "main", "master", "stable", "edge", "dev"})


@dataclass(frozen=True, slots=True)
class Image:
    """`registry:port/repository:tag@digest`, taken apart."""

    repository: str
    tag: str
    digest: str

    @property
    def ray_version(self) -> Version | None:
        """Ray's version: the tag of Ray's own images, or what follows `ray` in another tag (`0.1.0-ray2.60.0`)."""
        if self.repository.split("/")[-2:-1] == ["rayproject"]:
            return version(self.tag)
        found = _RAY_IN_TAG.search(self.tag)
        return version(self.tag[found.end() :]) if found else None

    @property
    def python_version(self) -> str | None:
        """Python's version in the tag of one of Ray's own images: `py311`."""
        found = _PYTHON_IN_TAG.search(self.tag) if self.repository.split("/")[-2:-1] == ["rayproject"] else None
        return found[1] if found else None

    @property
    def is_ours(self) -> bool:
        """Whether the name says that Penstock is in it."""
        return "penstock" in self.repository.rsplit("/", 1)[-1]


def parse_image(text: str) -> Image:
    """Take an image reference apart; the port of a registry is no tag."""
    name, _, digest = text.partition("@")
    head, colon, tag = name.rpartition(":")
    return Image(head, tag, digest) if colon and "/" not in tag else Image(name, "", digest)


def check_image(text: str, path: Path) -> Iterator[Problem]:
    """A reference that names one image, today and tomorrow."""
    image = parse_image(text)
    registry, slash, rest = image.repository.partition("/")
    named = rest if slash and ("." in registry or ":" in registry or registry == "localhost") else image.repository
    if not _NAME.fullmatch(named) or text != text.strip():
        yield Problem(path, f"{text!r} is no image name: lower case, digits and -_./ only")
    elif image.digest:
        if not _DIGEST.fullmatch(image.digest):
            yield Problem(path, f"{image.digest!r} is no digest: sha256: and 64 hexadecimal digits")
    elif not image.tag:
        yield Problem(path, f"{text!r} has no tag, which means :latest; name a version")
    elif not _TAG.fullmatch(image.tag):
        yield Problem(path, f"{image.tag!r} is no image tag")
    elif image.tag in FLOATING:
        yield Problem(path, f"{text!r} changes under its name; name a version")
