"""Several cuts of one model answer lm-eval's requests together: when the first is asked, all of them answer.

What they answer with is the engine's; here a request only finds its way there and back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from shallower.engine.likelihood import Asked, Likelihoods
from shallower.evaluation.answered import Answered, digest
from shallower.evaluation.respondent import Encoded, Respondent, Response, context_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Panelist(Respondent):
    """One candidate of a panel. It writes texts as a model in memory, which `cut` makes when that is asked for."""

    def __init__(
        self,
        panel: Sequence[Panelist],
        number: int,
        likelihoods: Likelihoods,
        tokenizer: PreTrainedTokenizerBase,
        cut: Callable[[], PreTrainedModel],
        **options: Any,
    ) -> None:
        super().__init__(likelihoods.anatomy.model, tokenizer, **options)
        self.panel = panel
        self.number = number
        self.likelihoods = likelihoods
        self._cut_model = cut
        self._ahead: dict[str, Response] = {}

    @cached_property
    def context(self) -> str:
        return digest(self.panel[0]._of_dense, "engine", self.likelihoods.routes[self.number])

    @cached_property
    def _of_dense(self) -> str:
        """Worked out once for the panel."""
        return context_of(self.likelihoods.anatomy.model)

    def _answers(self, todo: dict[str, Encoded]) -> Iterator[dict[str, Response]]:
        if not todo:
            return
        keys = list(todo)
        asked = []
        for _, context, continuation in todo.values():
            ids = (context + continuation)[-(self.max_length + 1) :]
            asked.append(Asked(tuple(ids[:-1]), tuple(continuation)))
        for part in self.likelihoods.of(asked):
            for member in self.panel:
                if member is not self:
                    answers = {keys[place]: found[member.number] for place, found in part.items()}
                    member._ahead |= answers
                    member._remember(answers)
            yield {keys[place]: found[self.number] for place, found in part.items()}

    def _recall(self, keys: Sequence[str]) -> dict[str, Any]:
        return super()._recall(keys) | {key: self._ahead[key] for key in keys if key in self._ahead}

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[str]:
        dense = self.model
        self._model = self._cut_model()
        try:
            return super().generate_until(requests)
        finally:
            self._model = dense


def make_panel(
    likelihoods: Likelihoods,
    tokenizer: PreTrainedTokenizerBase,
    cut: Callable[[int], PreTrainedModel],
    labels: Sequence[str],
    *,
    answered: Answered | None = None,
    truncate: bool = False,
) -> list[Panelist]:
    """A member for each candidate of `likelihoods`. cut: the candidate's model in memory, by its number."""
    panel: list[Panelist] = []
    for number, label in enumerate(labels):

        def own(number: int = number) -> PreTrainedModel:
            return cut(number)

        panel.append(
            Panelist(panel, number, likelihoods, tokenizer, own, answered=answered, truncate=truncate, label=label)
        )
    return panel
