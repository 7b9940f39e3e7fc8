"""The forms in which a model with units removed is stored, and how each is loaded. Torch-free.

ordinary   every block is whole: what any software loads
native     blocks lack sublayers, and the installed transformers says so in its own config
packaged   blocks lack sublayers: the folder carries the code that leaves them out
padded     sublayers are there and add nothing: what any software loads, for no gain
"""

from __future__ import annotations

from dataclasses import dataclass

from shallower.errors import UnknownName

CHOICES = ("auto", "packaged", "padded")
"""What can be asked for; `auto` is ordinary where that is possible, else native, else packaged."""


@dataclass(frozen=True)
class Form:
    """meaning: what loads it, in one or two sentences. loading, tokenizer: Python that loads it from `{folder}`."""

    name: str
    meaning: str
    loading: str
    tokenizer: str


_STOCK = """from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained({folder!r})"""
_TOKENIZER = """from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained({folder!r}"""
_CODE = """from transformers import AutoModelForCausalLM  # runs the two short files in the folder: read them first

model = AutoModelForCausalLM.from_pretrained({folder!r}, trust_remote_code=True)

import shallower  # or so, which runs no code of the folder

model = shallower.load({folder!r})"""

FORMS = {
    form.name: form
    for form in (
        Form(
            "ordinary", "It is an ordinary checkpoint; nothing but `transformers` is needed.", _STOCK, f"{_TOKENIZER})"
        ),
        Form(
            "native",
            "Its config says which sublayers are missing, in a way that the `transformers` which made it obeys. Older "
            "ones may ignore it and fill in random weights.",
            _STOCK,
            f"{_TOKENIZER})",
        ),
        Form(
            "packaged",
            "Its blocks lack sublayers, for which `transformers` has no class of its own: the folder carries one, in "
            "two short files. Blocks without attention hold no KV cache.",
            _CODE,
            f"{_TOKENIZER}, trust_remote_code=True)",  # without it, transformers asks on the terminal
        ),
        Form(
            "padded",
            "It is an ordinary checkpoint in which the removed sublayers are still there, with zeros in their output "
            "projections: it computes what the smaller model computes, and is no smaller and no faster.",
            _STOCK,
            f"{_TOKENIZER})",
        ),
    )
}


def require_form(name: str) -> str:
    """The name itself. Raises UnknownName for a form that cannot be asked for."""
    if name not in CHOICES:
        raise UnknownName("form", name, CHOICES)
    return name
