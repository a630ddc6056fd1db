"""Tags of deltas: a name for the contents of both images, or the one of open-balena-delta.

:mod:`obdelta.builds.inputs.delta_names` finds the images of a tag.
"""

from __future__ import annotations

import hashlib
import re

from obdelta.builds.types import Pair
from obdelta.oci import Form
from obdelta.store.catalogue.records import DeltaKey

_SUFFIXES = "|".join(re.escape(form.traits.tag_suffix) for form in Form)
DELTA_TAG = re.compile(rf"delta-[0-9a-f]{{16}}(?:{_SUFFIXES})", re.ASCII)
"""A delta's tag, as this server and open-balena-delta make it; with its form or without."""
_IMAGE = re.compile(r"v[0-9]+/([0-9a-f]{16,})", re.ASCII)


def is_delta_tag(tag: str | None) -> bool:
    """Returns whether a tag names a delta."""
    return tag is not None and tag.startswith("delta-")


def delta_tag(key: DeltaKey) -> str:
    """Returns ``delta-<16 hex>``: a name for both images' contents and the recipe, so that its
    meaning never changes. A form that is not universal is named behind it.
    """
    text = f"{key.kind} {key.recipe} {key.base} {key.target}"
    return tag_in(f"delta-{hashlib.sha256(text.encode('ascii')).hexdigest()[:16]}", key.form)


def registry_tag(pair: Pair) -> str:
    """Returns ``delta-`` and the first 16 hex digits of the base's repository, as open-balena-delta
    has it (``publish = registry``). A form that is not universal is named behind it.

    Where the base's repository has no such name (``org/app``, ``v2/<hash>-1``), the digits come
    from a hash over both contents.
    """
    match = _IMAGE.fullmatch(pair.base.repository)
    return tag_in(f"delta-{match[1][:16]}", pair.form) if match is not None else delta_tag(pair.key)


def tag_in(tag: str, form: Form = Form.UNIVERSAL) -> str:
    """Returns a delta's tag for one form, from its tag for any form."""
    return tag.removesuffix(Form.of_tag(tag).traits.tag_suffix) + form.traits.tag_suffix
