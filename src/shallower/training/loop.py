"""The training loop: steps, schedule, measurements on the way, divergence, resuming; on one device or many.

Notable features:
- Whatever of the objective's parameters takes gradients is trained, in float32, by AdamW.
- The loss of a step is a mean over its scored tokens, however they are split into portions and over processes.
- Step and seed decide what is read and which random numbers are drawn, so that a resumed training ends with the weights
  of an uninterrupted one, bit for bit where the arithmetic is repeatable.
- The weights that were best at a measurement are what is returned; a training that diverges goes back to them.
- accelerate wraps the objective, so that `accelerate launch` spreads a step over devices (data parallel, or FSDP 2).
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, replace
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, GradientAccumulationPlugin
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from shallower import progress
from shallower.checkpoint.dtype import DTYPES, choose_dtype
from shallower.checkpoint.fingerprint import fingerprint
from shallower.checkpoint.stock import copied
from shallower.errors import ModelError, UserError
from shallower.launched import agreed, require_shared, world_size
from shallower.training.divergence import LossTrend
from shallower.training.feed import SEEDS, Feed, Portion
from shallower.training.head_loss import Guide
from shallower.training.recipe import HeldOut, Recipe, Task
from shallower.training.state import State, StateStore, begun_options, require_room

BETAS = (0.9, 0.95)
MOMENTS = ("exp_avg", "exp_avg_sq", "step")  # what the optimizer keeps of a parameter
_PERHAPS_UNUSED = re.compile(r"\.experts\.\d|(expert|correction)_bias$")


class Guiding(Protocol):
    """A teacher. unwritten: bytes that it will yet take on the disk that the state of the training is on."""

    @property
    def unwritten(self) -> int: ...

    def guide(self, portion: Portion) -> Guide: ...

    def place(self, device: torch.device) -> None: ...


def train(objective: nn.Module, student: PreTrainedModel, task: Task, teacher: Guiding | None) -> PreTrainedModel:
    """Train the parameters of `objective` that take gradients; afterwards they hold the best weights.

    Returns the student, or where its weights were spread over processes, another one that holds them all, on the same
    device; what was not trained are the tensors that there were. `training.json` in the task's folder says how it went.

    objective: module whose forward (portion, guide) gives sums over scored tokens: the loss, and two parts of it.
    student: what held-out perplexity is measured of.

    Raises CorpusError when the text is too short for a step, ModelError when weights are no finite numbers from the
    start, OutputError when a state cannot be written or processes do not see the same folder, UserError when that holds
    another training. One that diverges stops, and goes back to the best weights it had.
    """
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        return _Loop(objective, student, task, teacher).run()


class _Whole(nn.Module):
    """What accelerate wraps: all that is computed with the student goes through this one forward."""

    def __init__(self, objective: nn.Module, student: PreTrainedModel) -> None:
        super().__init__()
        self.objective = objective
        self.student = student
        self._no_split_modules = student._no_split_modules  # where FSDP cuts

    def forward(self, portion: Portion | None, guide: Guide | None, measure: HeldOut | None = None) -> Any:
        return self.objective(portion, guide) if measure is None else measure(self.student)


class _Loop:
    def __init__(self, objective: nn.Module, student: PreTrainedModel, task: Task, teacher: Guiding | None) -> None:
        self.student, self.task, self.recipe, self.teacher = student, task, task.recipe, teacher
        launched = world_size() > 1
        on_cpu = student.device.type == "cpu"
        # alone, or on processors, the model stays where it is: accelerate's device is another one, or a copy's (cpu:1)
        moves = launched and not on_cpu
        unused = DistributedDataParallelKwargs(find_unused_parameters=_may_lack_gradients(student, task))
        # what `accelerate launch` was told of mixed precision would come over the recipe's number format
        try:
            self.accelerator = Accelerator(
                cpu=launched and on_cpu,
                device_placement=moves,
                mixed_precision="no",
                gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),  # the loop adds up by itself
                kwargs_handlers=[unused],
            )
        except ValueError as error:
            if "already been initialized" not in str(error):
                raise
            raise UserError(  # its state is the process's
                f"accelerate was used in this process already, in another way ({error}): train in a process of its own."
            ) from error
        self.device = self.accelerator.device if moves else student.device
        self.feed = Feed(task.text, self.recipe.batch, self.recipe.at_once, task.seed, self.accelerator.num_processes)
        self.steps = self.feed.total(self.recipe.epochs)
        settings = task.settings() | {"student": fingerprint(student)}
        self.store = StateStore(task.folder, settings)
        if task.folder is not None:
            require_shared(task.folder, self.device)
        whole = _Whole(objective, student)
        names = [name for name, parameter in whole.named_parameters() if parameter.requires_grad]
        if not names:
            raise UserError("nothing of the model takes gradients, so there is nothing to train.")
        trained = [whole.get_parameter(name) for name in names]
        # norms and biases do not; those of experts have two dimensions
        decaying = [p.ndim > 1 and not name.endswith("bias") for name, p in zip(names, trained, strict=True)]
        if task.folder is not None:
            unwritten = 0 if teacher is None else teacher.unwritten
            require_room(task.folder, sum(parameter.numel() for parameter in trained), unwritten)
        optimizer = torch.optim.AdamW(
            [
                {
                    "params": [p for p, decays in zip(trained, decaying, strict=True) if decays == wanted],
                    "weight_decay": decay,
                }
                for wanted, decay in ((True, self.recipe.weight_decay), (False, 0.0))
            ],
            betas=BETAS,
            fused=True,
        )
        if spread := self.accelerator.distributed_type == DistributedType.FSDP:
            # all processes hold the weights; loaded again from the first one's, tied weights would come apart
            self.accelerator.state.fsdp_plugin.cpu_ram_efficient_loading = False
        self.plain, self.home = _untrained(student) if spread else None, student.device
        self.objective, self.optimizer = self.accelerator.prepare(whole, optimizer)
        inner = self.accelerator.unwrap_model(self.objective)
        self.trained: dict[str, nn.Parameter] = {name: inner.get_parameter(name) for name in names}
        if teacher is not None and launched:
            teacher.place(self.device)
        self.state = State(settings)
        self.begun = self.saved = time.monotonic()
        self.before = 0.0  # seconds of earlier processes
        self.last: dict[str, float] = {}  # losses of the step before

    def run(self) -> PreTrainedModel:
        if (ended := self.store.finished()) is not None:
            self.state = ended
            self._set_weights(self.store.good())
            progress.note(f"trained already, for {self._spent()}; the weights of step {self.state.kept} are kept")
            return self._result()
        found = self.store.load()
        if found is None:
            self._measure()
        else:
            self.state, weights, moments = found
            self._set_weights(weights)
            self._set_moments(moments)
            self.before = self.state.seconds
            self.begun = time.monotonic()
            progress.note(f"resumed after step {self.state.step}, {self.state.tokens:,} tokens")
        stopped, shown = "", 0
        with progress.task("training", total=progress.PARTS) as bar:
            while not stopped and (share := self._share()) < 1:
                bar(int(share * progress.PARTS) - shown)
                shown = int(share * progress.PARTS)
                stopped = self._step(share) or self._after_step()
            bar(progress.PARTS - shown)
        if not stopped and self.state.curve[-1]["step"] != self.state.step:
            self._measure()  # the time ran out after the last step was looked at
        return self._end(stopped)

    def _seconds(self) -> float:
        return self.before + time.monotonic() - self.begun

    def _share(self) -> float:
        """Of the whole training, done: by steps or by time, whichever is more."""
        share = self.state.step / self.steps
        if self.recipe.minutes and self.state.step:
            share = max(share, agreed(self._seconds() / (60 * self.recipe.minutes), self.device))
        return share

    def _step(self, share: float) -> str:
        """One step of the optimizer. Returns why training has to stop, if it has."""
        rows = self.feed.step(self.state.step)
        counted = self.feed.scored(rows)
        here, processes = self.accelerator.process_index, self.accelerator.num_processes
        torch.manual_seed((((self.task.seed << 24) + self.state.step) * 1024 + here) % SEEDS)
        portions = list(self.feed.portions(rows[here::processes]))
        self.objective.train()
        sums = torch.zeros(3, dtype=torch.float32, device=self.device)
        for number, portion in enumerate(portions):
            guide = None if self.teacher is None else self.teacher.guide(portion)
            last = number == len(portions) - 1
            with nullcontext() if last else self.accelerator.no_sync(self.objective):
                losses = self.objective(portion, guide)
                # processes' gradients are averaged, and a step's loss is a mean over all of their tokens
                self.accelerator.backward(losses[0] * (processes / counted))
            sums += torch.stack([loss.detach().float() for loss in losses])
        norm = _whole(self.accelerator.clip_grad_norm_(self.trained.values(), self.recipe.clip))
        loss, nll, kl = (self.accelerator.reduce(sums, "sum") / counted).tolist()
        if trouble := self._trouble(loss, float(norm)):
            return trouble
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.lr * rate(share + 0.5 / self.steps, self.recipe.warmup)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.state.step += 1
        self.state.tokens += self.feed.real(rows)
        self.last = {"loss": loss, "nll": nll} | ({"kl": kl} if self.recipe.distill else {})
        return ""

    def _trouble(self, loss: float, norm: float) -> str:
        """Whether this step's loss shows that learning has failed."""
        state, step = self.state, self.state.step + 1
        if not math.isfinite(loss) or not math.isfinite(norm):
            return f"it diverged: at step {step} the loss was {loss:.4g} and its gradient's norm {norm:.4g}"
        before = LossTrend(**state.losses)
        losses = before.after(loss)
        if losses.spoiled:
            return f"it diverged: at step {step} the mean loss was {losses.mean:.4g}, and {before.reference:.4g} before"
        state.losses = asdict(losses)
        return ""

    def _after_step(self) -> str:
        """Measure and save where it is time. Returns why training has to stop, if it has."""
        share, wanted = self._share(), self.recipe.evaluations
        if share >= 1 or share * wanted >= self.state.measured:
            self._measure()
            if 0 < self.recipe.patience <= self.state.worse:
                return f"{self.state.worse} measurements in a row brought nothing better"
        self.state.seconds = self._seconds()
        if share < 1 and agreed(time.monotonic() - self.saved, self.device) >= 60 * self.recipe.save_minutes:
            self._save()
            self.saved = time.monotonic()
        return ""

    def _measure(self) -> None:
        """Measure held-out perplexity and keep the weights if they are the best; where nothing is held out, keep them
        unless the training's own loss is on the way to divergence. Weights that are no numbers are never kept.
        """
        state = self.state
        row: dict[str, Any] = {"step": state.step, "tokens": state.tokens, "minutes": round(self._seconds() / 60, 3)}
        row |= self.last
        if self.task.held_out is not None:
            row["held_out"] = self._held_out(self.task.held_out)
        state.curve.append(row)
        state.measured = math.floor(self._share() * self.recipe.evaluations) + 1
        weights = self._weights()
        finite = all(bool(torch.isfinite(each).all()) for each in weights.values())
        if not finite and not state.step:
            raise ModelError(
                "weights of the model that is to be trained are no finite numbers, so nothing can be learned with "
                "them: its checkpoint is damaged, or it was repaired in a number format that is too small for it "
                "(--dtype float32)."
            )
        if self._better(row.get("held_out")) and finite:
            state.best, state.worse, state.kept = row.get("held_out"), 0, state.step
            if self.task.folder is None or self.accelerator.is_main_process:
                self.store.keep(weights, state)
        else:
            state.worse += state.step > state.kept  # a resumed one may know of good weights that lie ahead
        self.accelerator.wait_for_everyone()

    def _better(self, held_out: float | None) -> bool:
        """Whether the weights as they are shall be kept."""
        state = self.state
        if held_out is not None:
            return state.best is None or math.isnan(state.best) or held_out < state.best
        return not LossTrend(**state.losses).in_doubt

    def _held_out(self, measure: HeldOut) -> float:
        device, compute = self.device.type, number_format(self.recipe, self.student)
        if hasattr(self.objective, "unshard") and not self.state.step:
            # FSDP makes its buffers at the first pass, and those that inference mode makes take no gradients after
            portion = self.feed.portion(self.feed.step(0)[:1])
            with torch.no_grad():
                self.objective(portion, None if self.teacher is None else self.teacher.guide(portion))
        self.objective.eval()
        with torch.no_grad(), torch.autocast(device, compute, enabled=compute != torch.float32):
            return agreed(self.objective(None, None, measure), self.device)

    def _save(self) -> None:
        weights, moments = self._weights(), self._moments()
        if self.accelerator.is_main_process:
            self.store.save(self.state, weights, moments)
        self.accelerator.wait_for_everyone()

    def _weights(self) -> dict[str, Tensor]:
        return {name: _whole(parameter.detach()) for name, parameter in self.trained.items()}

    def _set_weights(self, weights: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in self.trained.items():
                parameter.copy_(_spread(weights[name], parameter))

    def _moments(self) -> dict[str, Tensor]:
        """The optimizer's two running means of each parameter that ever had a gradient, and how many it had."""
        return {
            f"{name}.{moment}": _whole(self.optimizer.state[parameter][moment])
            for name, parameter in self.trained.items()
            for moment in MOMENTS
            if parameter in self.optimizer.state
        }

    def _set_moments(self, moments: Mapping[str, Tensor]) -> None:
        for name, parameter in self.trained.items():
            found = {key: moments[f"{name}.{key}"] for key in MOMENTS if f"{name}.{key}" in moments}
            if found:
                self.optimizer.state[parameter] = {
                    key: moment.to(parameter.device) if key == "step" else _spread(moment, parameter)
                    for key, moment in found.items()
                }

    def _end(self, stopped: str) -> PreTrainedModel:
        state = self.state
        state.seconds = self._seconds()
        self._set_weights(self.store.good())  # after a resume those of the last step may be others
        self.optimizer.zero_grad(set_to_none=True)
        why = f"training stopped early: {stopped}; " if stopped else "trained for "
        progress.note(f"{why}{self._spent()}; the weights of step {state.kept} are kept")
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            self.store.finish(state, stopped)
        self.accelerator.wait_for_everyone()  # others read what was finished
        return self._result()

    def _spent(self) -> str:
        state = self.state
        return f"{state.step} steps, {state.tokens:,} tokens, {state.seconds / 60:.1f} minutes"

    def _result(self) -> PreTrainedModel:
        return self.student if self.plain is None else _filled(self.plain, self.student, self.home)


def settled(task: Task, student: PreTrainedModel) -> Task:
    """The task with a number format of products in the place of `auto`: the one that its training was begun with, where
    it resumes one, as two measurements may not come to the same.
    """
    recipe = task.recipe
    if recipe.compute != "auto":
        return task
    begun = begun_options(task.folder).get("compute")
    compute = DTYPES[begun] if begun in DTYPES else number_format(recipe, student)
    return replace(task, recipe=replace(recipe, compute="bfloat16" if compute == torch.bfloat16 else "float32"))


def rate(share: float, warmup: float) -> float:
    """Share of the learning rate after `share` of the training: up in a line, then down along a cosine to 0."""
    if share < warmup:
        return share / warmup
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (share - warmup) / (1 - warmup))))


def number_format(recipe: Recipe, model: PreTrainedModel) -> torch.dtype:
    """What products are computed in: as the recipe says, or what is measured to be faster; never float16, and not
    float32 where weights that are not trained are in half precision.
    """
    if any(parameter.dtype != torch.float32 for parameter in model.parameters() if parameter.is_floating_point()):
        return torch.bfloat16
    if recipe.compute != "auto":
        return DTYPES[recipe.compute]
    chosen = choose_dtype(model.device)
    return torch.float32 if chosen == torch.float16 else chosen


def _may_lack_gradients(student: PreTrainedModel, task: Task) -> bool:
    """Whether a step may use no part of some weight: norms of missing halves, experts that it does not meet, biases by
    which experts are only chosen.
    """
    halves = any(unit.kind != "block" for unit in task.removed)
    return halves or any(_PERHAPS_UNUSED.search(name) for name, _ in student.named_parameters())


def _untrained(student: PreTrainedModel) -> PreTrainedModel:
    """The student's modules before they are spread over processes, without the weights that are to be trained."""
    held = {
        id(p): nn.Parameter(p.detach().to("meta") if p.requires_grad else p.detach(), requires_grad=False)
        for p in student.parameters()
    }
    return copied(student, dict(held))


def _filled(plain: PreTrainedModel, student: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """`plain` with the trained weights of `student`; all processes take part, and each gets all of them."""
    owners = dict(plain.named_modules())
    filled: dict[int, nn.Parameter] = {}
    for name, parameter in student.named_parameters(remove_duplicate=False):
        owner, _, key = name.rpartition(".")
        parameters = owners[owner]._parameters
        if (empty := parameters[key]) is None or not empty.is_meta:
            continue
        if id(parameter) not in filled:
            filled[id(parameter)] = nn.Parameter(_whole(parameter.detach()).to(device), requires_grad=False)
        parameters[key] = filled[id(parameter)]
    return plain.to(device)


def _whole(tensor: Tensor) -> Tensor:
    """All of a tensor that may be spread over devices."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _spread(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, placed as `like` is."""
    moved = tensor.to(like.device)
    return distribute_tensor(moved, like.device_mesh, like.placements) if isinstance(like, DTensor) else moved
