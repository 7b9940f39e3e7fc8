"""What the trained methods share: a student with weights of its own, and the text objective with its teacher."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext

import torch
from torch import nn
from transformers import PreTrainedModel

from shallower.anatomy.dissect import find_blocks
from shallower.engine.head import find_head
from shallower.errors import UserError
from shallower.launched import world_size
from shallower.resources import parse_memory
from shallower.training.acceleration import attend, compiled, recompute
from shallower.training.feed import Feed
from shallower.training.loop import Guiding, number_format, settled, train
from shallower.training.objective import TextObjective, shared_blocks
from shallower.training.recipe import Task, Trained
from shallower.training.teacher import CachedTeacher, Teacher, open_cache, require_same_words


def own_parameters(student: PreTrainedModel, trained: Trained = lambda name: False) -> dict[str, torch.dtype]:
    """Give a student parameters of its own, as a cut one shares the dense model's.

    trained: whether a parameter of that name is to be trained; it becomes a float32 copy, and its number format so far
    is returned. Others keep their storage and take no gradients.
    """
    new: dict[int, nn.Parameter] = {}
    formats = {}
    for name, parameter in student.named_parameters():  # one that is tied comes once
        if trained(name):
            new[id(parameter)] = nn.Parameter(parameter.detach().to(torch.float32, copy=True))
            formats[name] = parameter.dtype
        else:
            new[id(parameter)] = nn.Parameter(parameter.detach(), requires_grad=False)
    for module in student.modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[key] = new[id(parameter)]
    return formats


def block_of(student: PreTrainedModel) -> Callable[[str], int | None]:
    """A function from a parameter's name to its block's number, None for what is outside of the blocks."""
    path, _ = find_blocks(student)

    def number(name: str) -> int | None:
        rest = name.removeprefix(f"{path}.")
        return int(rest.split(".")[0]) if rest != name else None

    return number


def heal(student: PreTrainedModel, task: Task) -> PreTrainedModel:
    """Train what of the student takes gradients on the task's text, with the dense model as teacher if so asked.
    Returns the student (another object where its weights were spread over processes).

    Raises ModelError when teacher and student have other vocabularies, UserError when the teacher's cache has no place,
    and as `train` does.
    """
    task = settled(task, student)
    recipe = task.recipe
    teacher: Guiding | None = None
    head, compute = find_head(task.anatomy), number_format(recipe, student)
    shared = 0
    if recipe.needs_teacher:
        require_same_words(task.anatomy.model, student)
        alone = world_size() == 1  # else the blocks are spread over devices
        shared = shared_blocks(student, task.anatomy) if alone and not recipe.teacher_cache else 0
        teacher = _teacher(task, Teacher(task.anatomy, compute, shared))
    if recipe.recompute:
        recompute(student, True)
    objective = TextObjective(
        student,
        head,
        compute,
        distill=recipe.distill,
        temperature=recipe.temperature,
        hidden=recipe.hidden,
        shared=shared,
    )
    own = attend(student, recipe.attention)
    try:
        with compiled(student, shared) if recipe.compile else nullcontext():
            student = train(objective, student, task, teacher)
    finally:
        attend(student, own)
        if recipe.recompute:
            recompute(student, False)
        if isinstance(teacher, CachedTeacher):
            teacher.close()
    return student


def finish(student: PreTrainedModel, formats: Mapping[str, torch.dtype]) -> PreTrainedModel:
    """The student in evaluation mode, its parameters as those of any loaded model.

    formats: those that trained parameters had before.
    """
    for name, parameter in student.named_parameters():
        parameter.data = parameter.data.to(formats.get(name, parameter.dtype))
        if parameter.is_floating_point():
            parameter.requires_grad_(True)
    return student.eval()


def _teacher(task: Task, teacher: Teacher) -> Teacher | CachedTeacher:
    budget = parse_memory(task.recipe.teacher_cache or None)
    if budget is None:
        return teacher
    if task.folder is None:
        raise UserError("teacher_cache needs a folder to be kept in: name one, or leave teacher_cache out.")
    text = Feed(task.text, 1, 1, task.seed)
    scored = text.scored(tuple(range(task.text.sequences)))
    return open_cache(teacher, task.folder, task.text.digest, budget, scored, task.recipe.temperature)
