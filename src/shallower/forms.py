"""The forms in which a model with units removed is stored, and how each is loaded. Torch-free.

ordinary   every block is whole: what software for the family loads (docs/formats.md has an exception)
native     blocks lack sublayers, and the installed transformers says so in its own config
packaged   blocks lack sublayers: the folder carries the code that leaves them out
padded     sublayers are there and add nothing: what the same software loads, for no gain

Where the model is of code that came with it, the folder has that code, too, and the form is one `with its code`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from shallower.errors import UnknownName

CHOICES = ("auto", "packaged", "padded")
"""What can be asked for; `auto` is ordinary where that is possible, else native, else packaged."""


@dataclass(frozen=True)
class Form:
    """meaning: what loads it, in one or two sentences. carries_code: the folder has code of ours that transformers must
    run. its_code: it has code that came with the original.
    """

    name: str
    meaning: str
    carries_code: bool = False
    its_code: bool = False

    @property
    def with_its_code(self) -> Form:
        """The same form for a model of code that came with it."""
        return replace(
            self,
            name=f"{self.name} with its code",
            meaning=f"{self.meaning} It runs the code that came with the original, which is in the folder, too.",
            its_code=True,
        )

    def loading(self, folder: str, *, tokenizer: bool = True) -> str:
        """Python that loads `folder`, with its tokenizer where it has one."""
        names = "AutoModelForCausalLM, AutoTokenizer" if tokenizer else "AutoModelForCausalLM"
        where = f"{folder!r}, trust_remote_code=True" if self.carries_code or self.its_code else f"{folder!r}"
        lines = [f"from transformers import {names}", f"model = AutoModelForCausalLM.from_pretrained({where})"]
        if tokenizer:
            lines.append(f"tokenizer = AutoTokenizer.from_pretrained({where})")
        if self.its_code:
            lines[0] += "  # runs the code in the folder, which came with the original: read it first"
        elif self.carries_code:
            lines[0] += "  # runs the two short files in the folder: read them first"
            lines += ["", "import shallower  # or, without running code of the folder:", ""]
            lines.append(f"model = shallower.load({folder!r})")
        return "\n".join(lines)


_PLAIN = (
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
FORMS = {form.name: form for form in (*_PLAIN, *(plain.with_its_code for plain in _PLAIN if not plain.carries_code))}


def require_form(name: str) -> str:
    """The name itself. Raises UnknownName for a form that cannot be asked for."""
    if name not in CHOICES:
        raise UnknownName("form", name, CHOICES)
    return name
