"""The forms in which a model with units removed is stored, and how each is loaded. Torch-free.

ordinary   every block is whole: what software for the family loads (docs/formats.md has an exception)
native     blocks lack sublayers, and the installed transformers says so in its own config
packaged   blocks lack sublayers: the folder carries the code that leaves them out
padded     sublayers are there and add nothing: what the same software loads, for no gain
"""

from __future__ import annotations

from dataclasses import dataclass

from shallower.errors import UnknownName

CHOICES = ("auto", "packaged", "padded")
"""What can be asked for; `auto` is ordinary where that is possible, else native, else packaged."""


@dataclass(frozen=True)
class Form:
    """meaning: what loads it, in one or two sentences. carries_code: the folder has code that transformers must run."""

    name: str
    meaning: str
    carries_code: bool = False

    def loading(self, folder: str, *, tokenizer: bool = True) -> str:
        """Python that loads `folder`, with its tokenizer where it has one."""
        names = "AutoModelForCausalLM, AutoTokenizer" if tokenizer else "AutoModelForCausalLM"
        where = f"{folder!r}, trust_remote_code=True" if self.carries_code else f"{folder!r}"
        lines = [f"from transformers import {names}", f"model = AutoModelForCausalLM.from_pretrained({where})"]
        if tokenizer:
            lines.append(f"tokenizer = AutoTokenizer.from_pretrained({where})")
        if self.carries_code:
            lines[0] += "  # runs the two short files in the folder: read them first"
            lines += ["", "import shallower  # or, without running code of the folder:", ""]
            lines.append(f"model = shallower.load({folder!r})")
        return "\n".join(lines)


FORMS = {
    form.name: form
    for form in (
        Form("ordinary", "It is an ordinary checkpoint; nothing but `transformers` is needed."),
        Form(
            "native",
            "Its config says which sublayers are missing, in a way that the `transformers` which made it obeys. Older "
            "ones may ignore it and fill in random weights.",
        ),
        Form(
            "packaged",
            "Its blocks lack sublayers, for which `transformers` has no class of its own: the folder carries one, in "
            "two short files. Blocks without attention hold no KV cache.",
            carries_code=True,
        ),
        Form(
            "padded",
            "It is an ordinary checkpoint in which the removed sublayers are still there, with zeros in their output "
            "projections: it computes what the smaller model computes, and is no smaller and no faster.",
        ),
    )
}


def require_form(name: str) -> str:
    """The name itself. Raises UnknownName for a form that cannot be asked for."""
    if name not in CHOICES:
        raise UnknownName("form", name, CHOICES)
    return name
