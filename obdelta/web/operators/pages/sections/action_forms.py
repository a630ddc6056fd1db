"""Buttons of actions: forms that the server accepts only from its own pages."""

from __future__ import annotations

from dataclasses import dataclass

from twisted.web.template import Tag, tags

ACTIONS = {
    "kept": ("pin", "drop"),
    "pinned": ("unpin",),
    "building": ("cancel",),
    "queued": ("cancel",),
    "failed": ("retry", "forget"),
    "skipped": ("retry", "forget"),
}
"""The actions that fit each state."""
_QUESTIONS = {
    "drop": "Remove this delta? The next device that requests it has to wait for a new build.",
    "cancel": "End this build? Its devices pull in full.",
}


@dataclass(frozen=True, slots=True)
class ActionForms:
    """Makes the buttons. ``token`` is in every form; "" if browsers cannot act."""

    token: str

    @property
    def enabled(self) -> bool:
        """Whether browsers can act."""
        return bool(self.token)

    def buttons(self, id_: str, state: str, back: str) -> Tag:
        """Returns the buttons for an entry. ``back``: the page to display afterwards."""
        return tags.div(
            *(self._form(id_, action, back) for action in ACTIONS.get(state, ())), class_="actions"
        )

    def _form(self, id_: str, action: str, back: str) -> Tag:
        question = _QUESTIONS.get(action)
        return tags.form(
            tags.input(type="hidden", name="token", value=self.token),
            tags.input(type="hidden", name="back", value=back),
            tags.button(
                action.capitalize(),
                id=f"{action}-{id_}",
                **({"data-confirm": question} if question else {}),
            ),
            action=f"/deltas/{id_}/{action}",
            method="post",
        )


NO_FORMS = ActionForms("")
