"""The size limit of deltas: decides that a delta is too large, or that its other form is better.

:mod:`obdelta.builds.failures` remembers these decisions.
"""

from __future__ import annotations

from obdelta.errors import ObdeltaError
from obdelta.oci import Form


class DeltaTooLarge(ObdeltaError):
    """The delta saves too little of a full pull (:func:`check_delta_size`)."""

    def __init__(self, delta_bytes: int, full_bytes: int) -> None:
        self.delta_bytes, self.full_bytes = delta_bytes, full_bytes
        super().__init__(
            f"the delta is too large: it has {delta_bytes} bytes, the full download {full_bytes}"
        )


class OtherFormCostsLess(ObdeltaError):
    """The pair has a delta in a form that costs less, also for engines that read both: each form is
    planned separately, so either may be the better one.
    """

    def __init__(self, form: Form, better: Form) -> None:
        super().__init__(
            f"the {form.value} form is not needed: the {better.value} form costs devices less"
        )


def check_delta_size(
    delta_bytes: int, full_bytes: int, max_delta_ratio: float, command_bytes: float = 0.0
) -> None:
    """Raises DeltaTooLarge if the delta has more than ``max_delta_ratio`` (the setting) of the
    full download's bytes, and the update takes longer with it.

    ``command_bytes``: bytes that arrive while the device runs the delta's commands. With 0 only
    bytes count: on metered links, and if nothing is known of the commands. Unpacking takes the
    same time either way.
    """
    takes_longer = not command_bytes or delta_bytes + command_bytes > full_bytes
    if delta_bytes > max_delta_ratio * full_bytes and takes_longer:
        raise DeltaTooLarge(delta_bytes, full_bytes)
