"""The inner loop: a network's weights, adapted to each task's support by gradient steps. There is one, and this is it.

MAML and its family are what an outer loop makes of it (``snail.maml``): which weights are adapted and at which rates,
and what is differentiated through.

Axes: ``b`` task (an episode), ``s`` support items, ``q`` query items, ``n`` ways.
"""

from __future__ import annotations

import copy
import math
import warnings
from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .episodes import Episode
from .learner import Learner, answer_loss, name_network
from .recorded import Recorded
from .tasks import Statistics, batch_norm_layers, run_tasks, side_by_side

__all__ = ["BatchNorm", "GradientLearner", "InnerRates", "LearnedRates", "Task", "task_losses"]

BatchNorm = Literal["inductive", "transductive", "running"]
LearnedRates = Literal["parameter", "layer_and_step"]
InnerOptimizer = Literal["sgd", "adam"]
Weights = dict[str, Tensor]
"""Adapted weights by name, each ``(b, *shape)``."""
Found = tuple[int, Statistics]
"""What batch norm found in a pass, and which of the inner loop's passes that was."""
DECAY = 0.999  # of Adam's running mean of squared gradients


def detached(weights: Weights) -> Weights:
    """The same weights as leaves: a gradient can be taken by them, and none flows through them."""
    return {name: weight.detach().requires_grad_() for name, weight in weights.items()}


def task_losses(answer: Tensor, truth: Tensor) -> Tensor:
    """The mean loss of each task, ``(b,)``: cross-entropy of logits ``(b, q, n)``, squared error of values."""
    if truth.is_floating_point():
        return F.mse_loss(answer, truth, reduction="none").flatten(1).mean(1)
    each = F.cross_entropy(answer.flatten(0, 1), truth.flatten().long(), reduction="none")
    return each.view(truth.shape).mean(1)


class InnerRates(nn.Module):
    """The rates of the inner loop's steps: one number, or learned with the weights.

    Args:
        weights: The adapted weights by name.
        rate: The rate, or where learning it starts.
        learned: ``None``: the number; ``parameter``: one for each element of each weight (Meta-SGD, Li et al., 2017);
            ``layer_and_step``: one for each weight and step (MAML++, Antoniou et al., 2019).
        steps: Steps that have a rate of their own; later ones use the last.

    Raises:
        ValueError: If ``learned`` is another word.
    """

    def __init__(self, weights: dict[str, Tensor], rate: float, learned: LearnedRates | None, steps: int) -> None:
        super().__init__()
        if learned not in (None, *get_args(LearnedRates)):
            raise ValueError(f"learn_rates is {learned!r}; choose one of {', '.join(get_args(LearnedRates))}, or none")
        self.rate, self.kind, self.steps = rate, learned, steps
        self.learned = nn.ParameterDict()
        for name, weight in weights.items() if learned else ():
            start = (
                torch.full_like(weight.detach(), rate) if learned == "parameter" else weight.new_full((steps,), rate)
            )
            self.learned[_key(name)] = nn.Parameter(start.detach())

    def forward(self, name: str, step: int) -> Tensor | float:
        """The rate of a weight at a step, counted from 0: a number, or what multiplies ``(*shape)``."""
        if self.kind is None:
            return self.rate
        value: Tensor = self.learned[_key(name)]
        return value if self.kind == "parameter" else value[min(step, self.steps - 1)]


def _key(name: str) -> str:
    return name.replace(".", "/")  # what holds parameters allows no dots


@dataclass(eq=False)
class Task:
    """Some tasks on their way through the inner loop.

    Args:
        part: Which part of the network the items enter: ``""`` for all of it, or ``head.`` where the embedding is the
            same throughout and was run beforehand.
        support: ``(b, s, *item)``.
        support_y: ``(b, s)``, or ``(b, s, d)`` for regression.
        query: ``(b, q, *item)``.
        found: What batch norm found so far, if that is wanted.
        losses: The support's mean loss before each step so far.
        moments: The running mean of each weight's squared gradient, where the inner optimiser keeps one.
        began: The weights before the first step, as constants.
    """

    part: str
    support: Tensor
    support_y: Tensor
    query: Tensor
    found: list[Found] = field(default_factory=list)
    losses: list[Tensor] = field(default_factory=list)
    moments: Weights = field(default_factory=dict)
    began: Weights = field(default_factory=dict)


class GradientLearner(Learner):
    """A learner that adapts a network's weights to each episode's support by gradient descent.

    What is adapted is named by patterns; what is learned from the adapted weights' answers is said by ``meta_loss`` in
    the classes below this one. Parameters are used functionally, so any ``nn.Module`` goes in as it is; the statistics
    that its batch-norm layers use are chosen here.

    Args:
        embedding: Any module from ``(items, *item)`` to ``(items, c)``, or without ``embedding_dim`` the whole network,
            to ``(items, n)``.
        embedding_dim: Channels c of the embedding, behind which a linear head to ``ways`` logits is put; ``None`` where
            ``embedding`` has its own.
        ways: Classes in an episode. Taken from the data on the command line; ``None`` for regression.
        adapt: Which parameters the inner loop changes: patterns (as of file names) of their names, which begin with
            ``embedding.`` or ``head.``. The others are learned in the outer loop alone.
        steps: Gradient steps in training.
        test_steps: Gradient steps when scoring, or a list of numbers that are scored each by itself; as in training if
            not given.
        inner_rate: The rate of the inner steps.
        inner_optimizer: ``sgd``, or ``adam`` without momentum (Reptile's), which begins anew with each task.
        learn_rates: Whether the rates are learned too, from ``inner_rate`` on: ``parameter``: one for each element of
            each weight (Meta-SGD); ``layer_and_step``: one for each weight and step (MAML++).
        batch_norm: Whose statistics batch norm uses. ``inductive``: the support's, under the weights that answer, for
            support and queries; ``transductive``: those of each batch itself, so that queries help each other, as the
            original MAML has it; ``running``: averages over training, of the batches themselves in training.
        per_step_norm: Whether each inner step has batch-norm weights of its own, learned in the outer loop alone, and
            with ``running`` averages of its own (MAML++).
        tasks_at_once: Tasks that are computed together; memory grows with it. By default all on a GPU, and on a CPU as
            many as are fastest there by the size of their supports (``snail bench maml`` measures it): 4 of 5-way
            1-shot Omniglot, one of 20-way and of large images.
        threads: On a CPU, how many such groups are computed side by side, each on one thread, which is faster than
            several threads on one. By default as many as torch uses; 1 where the network draws random numbers, whose
            order would not be the same twice, or cannot be copied.
        recompute: Whether inner steps are computed again in the backward pass instead of kept, so that memory hardly
            grows with their number.
        record: Whether on a GPU the kernels of a training step are recorded once for each shape and then replayed
            (``snail.recorded``), which spares the time of starting thousands of them one by one. It needs a network
            that looks at no number in a tensor; one that does is run as it is, with a warning.

    Shape:
        ``(b, s, *item), (b, s), (b, q, *item) -> (b, q, n)`` logits; with labels ``(b, s, d)`` values ``(b, q, d)``.

    Raises:
        ValueError: If a size is too small, a word unknown, or ``adapt`` matches no parameter.
    """

    half_precision = False
    # What is fastest on a CPU: with less of it together the work is in crumbs, with more it leaves the caches.
    numbers_on_cpu = 16_000  # in the supports of the tasks that are computed together
    strength = 0.0  # half of it times the squared distance to where the loop began is added to the support's loss
    momentum = 0.1  # of the running averages, per meta-step

    def __init__(
        self,
        embedding: nn.Module,
        embedding_dim: int | None = None,
        ways: int | None = None,
        *,
        adapt: Sequence[str] = ("*",),
        steps: int = 1,
        test_steps: int | list[int] | None = None,
        inner_rate: float = 0.4,
        inner_optimizer: InnerOptimizer = "sgd",
        learn_rates: LearnedRates | None = None,
        batch_norm: BatchNorm = "inductive",
        per_step_norm: bool = False,
        tasks_at_once: int | None = None,
        threads: int | None = None,
        recompute: bool = False,
        record: bool = True,
    ) -> None:
        super().__init__()
        if embedding_dim is not None and ways is None:
            raise ValueError(f"embedding_dim is {embedding_dim}, but the head behind it needs ways; give both")
        tested = test_steps if isinstance(test_steps, list) else [steps if test_steps is None else test_steps]
        for what, value, least in (
            ("steps", steps, 1),
            ("test_steps", min(tested, default=-1), 0),
            ("ways", 1 if ways is None else ways, 1),
            ("tasks_at_once", 1 if tasks_at_once is None else tasks_at_once, 1),
            ("threads", 1 if threads is None else threads, 1),
        ):
            if value < least:
                raise ValueError(f"{what} is {value}; it must be at least {least}")
        for what, word, words in (
            ("batch_norm", batch_norm, get_args(BatchNorm)),
            ("inner_optimizer", inner_optimizer, get_args(InnerOptimizer)),
        ):
            if word not in words:
                raise ValueError(f"{what} is {word!r}; choose one of {', '.join(words)}")
        head = nn.Identity() if embedding_dim is None or ways is None else nn.Linear(embedding_dim, ways)
        self.network = nn.Sequential(OrderedDict(embedding=embedding, head=head))
        self.ways = ways
        self.steps, self.tested = steps, sorted(set(tested))
        self.inner_rate, self.inner_optimizer = inner_rate, inner_optimizer
        self.norm_mode, self.per_step_norm = batch_norm, per_step_norm
        self.tasks_at_once, self.threads, self.recompute = tasks_at_once, threads, recompute
        self._draws: dict[tuple[str, bool], bool] = {}  # whether what runs in a mode draws random numbers
        self._prepare_batch_norm()
        names = [name for name, _ in self.network.named_parameters() if _key(name) not in self.step_norm]
        self.adapted = [name for name in names if any(fnmatchcase(name, pattern) for pattern in adapt)]
        if not self.adapted:
            raise ValueError(f"adapt = {list(adapt)} matches none of the parameters {', '.join(names)}")
        own = dict(self.network.named_parameters())
        self.rates = InnerRates({name: own[name] for name in self.adapted}, inner_rate, learn_rates, steps)
        self.meta_steps = 0
        self.record = record
        self._recorded = Recorded(self._meta_gradients)

    def _prepare_batch_norm(self) -> None:
        layers = batch_norm_layers(self.network)
        passes = self.steps + 1 if self.per_step_norm else 1  # the last is that of the queries
        self.step_norm = nn.ParameterDict()
        if self.per_step_norm:
            for layer, norm in layers.items():
                for name, weight in norm.named_parameters():
                    start = weight.detach().expand(passes, *weight.shape).clone()
                    self.step_norm[_key(f"{layer}.{name}")] = nn.Parameter(start)
                    weight.requires_grad_(False)  # replaced throughout
        self.averages = nn.Module()
        if self.norm_mode == "running":
            for layer, norm in layers.items():
                if norm.running_mean is None or norm.running_var is None:
                    raise ValueError(f"batch_norm='running' needs averages, but layer {layer} keeps none; take another")
                for what, average in (("mean", norm.running_mean), ("var", norm.running_var)):
                    self.averages.register_buffer(f"{what}/{_key(layer)}", average.expand(passes, -1).clone())

    # -- what is said about it ---------------------------------------------------------------------------------

    @property
    def transductive(self) -> bool:  # type: ignore[override]
        """See ``Learner``: queries are normalised by each other's statistics."""
        return self.norm_mode == "transductive"

    @property
    def batch_norm(self) -> str:
        """See ``Learner.batch_norm``; it tells of running averages, and where there is no batch norm at all."""
        if self.norm_mode != "transductive" and not batch_norm_layers(self.network):
            return "none"
        return "inductive, running averages" if self.norm_mode == "running" else self.norm_mode

    @property
    def network_name(self) -> str:
        """See ``Learner.network_name``."""
        return name_network(self.network.get_submodule("embedding"))

    @property
    def note(self) -> str:
        """See ``Learner.note``: the inner loop of training."""
        told = [f"{self.steps} step{'s' * (self.steps > 1)} of {self.inner_optimizer} at {self.inner_rate:g}"]
        if self.rates.kind is not None:
            told.append(f"rates learned by {self.rates.kind.replace('_', ' ')}")
        if self.per_step_norm:
            told.append("batch norm by step")
        return ", ".join(told)

    @property
    def variants(self) -> list[dict[str, Any]]:
        """See ``Learner.variants``: the numbers of inner steps that are scored."""
        return [{"inner_steps": steps} for steps in self.tested]

    # -- answering ---------------------------------------------------------------------------------------------

    def forward(self, support_x: Tensor, support_y: Tensor, query_x: Tensor) -> Tensor:
        """See ``Learner.forward``: the answer after the largest of ``test_steps``, without a graph."""
        return self.answers(support_x, support_y, query_x)[-1]

    def answers(self, support_x: Tensor, support_y: Tensor, query_x: Tensor) -> Tensor:
        """See ``Learner.answers``: one answer for each of ``test_steps``, ``(v, b, q, n)``, without a graph.

        Raises:
            FloatingPointError: If the inner loop diverges.
        """
        # Adapting takes gradients, also where a trainer has switched them off.
        with torch.inference_mode(False), torch.enable_grad():
            tensors = [x.clone() if x.is_inference() else x for x in (support_x, support_y, query_x)]
            return torch.cat(self._each_group("_answers", *tensors), dim=1)

    def _answers(self, support_x: Tensor, support_y: Tensor, query_x: Tensor) -> Tensor:
        with torch.no_grad():
            task = self.enter(support_x, support_y, query_x)
        weights = self.start(task, attached=False)
        answers = []
        for step in range(self.tested[-1] + 1):
            if step > 0:
                weights = detached(self.step(task, weights, step - 1, graph=False))
            if step in self.tested:
                with torch.no_grad():
                    answers.append(self.query(task, weights, step))
        self._check_finite(task, answers[-1])
        return torch.stack(answers)

    # -- training ----------------------------------------------------------------------------------------------

    @abstractmethod
    def meta_loss(self, task: Task, query_y: Tensor) -> tuple[Tensor, Tensor]:
        """What the outer loop learns from some tasks.

        Returns:
            A scalar, averaged over the tasks, whose gradient the outer optimiser takes; and the answers ``(b, q, n)``
            after the last step.
        """

    def loss(self, episode: Episode) -> tuple[Tensor, dict[str, Tensor]]:
        """See ``Learner.loss``. The gradient is computed along with it, a few tasks at a time; no graph is kept.

        Raises:
            FloatingPointError: If the inner loop diverges.
        """
        tensors = (episode.support_x, episode.support_y, episode.query_x, episode.query_y)
        with torch.enable_grad():
            groups = self._replayed(*tensors) if self._may_record(tensors[0]) else self._meta_gradients(*tensors)
        total = torch.stack([group.loss for group in groups]).sum() / len(episode)
        parameters = [parameter for parameter in self.parameters() if parameter.requires_grad]
        gradients = [_sum_of(each) for each in zip(*(group.gradients for group in groups), strict=True)]
        if self.training:
            self._update_averages([found for group in groups for found in group.found], len(episode))
            self.meta_steps += 1
        _, logs = answer_loss(torch.cat([group.answer for group in groups]), episode)
        return _WithGradient.apply(total, gradients, 1 / len(episode), *parameters), logs

    def _meta_gradients(self, *tensors: Tensor) -> list[_Group]:
        return self._each_group("_meta_gradient", *tensors)

    def _meta_gradient(self, support_x: Tensor, support_y: Tensor, query_x: Tensor, query_y: Tensor) -> _Group:
        parameters = [parameter for parameter in self.parameters() if parameter.requires_grad]
        task = self.enter(support_x, support_y, query_x)
        mean, answer = self.meta_loss(task, query_y)
        if mean.device.type == "cpu":  # elsewhere to look is to wait; who trains looks at the loss now and then
            self._check_finite(task, mean)
        loss = mean * len(support_x)
        wanted = bool(parameters) and loss.requires_grad
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True) if wanted else [None] * len(parameters)
        return _Group(loss.detach(), gradients, answer.detach(), task.found)

    # -- on a GPU: recorded and replayed -------------------------------------------------------------------------

    @property
    def settled(self) -> bool:
        """Whether the loss does not change any more as training goes on, but for the weights."""
        return True

    def _may_record(self, support_x: Tensor) -> bool:
        on_gpu = support_x.device.type == "cuda"
        return self.record and on_gpu and self.settled and not torch.is_autocast_enabled("cuda")

    def _replayed(self, *tensors: Tensor) -> list[_Group]:
        read = [*self.parameters(), *self.buffers()]
        try:
            groups = self._recorded(*tensors, reads=read, depends_on=self.training)
        except RuntimeError as error:
            self.record = False
            warnings.warn(
                f"a training step of {type(self).__name__} cannot be recorded ({str(error).splitlines()[0]}); it is "
                f"run as it is, which is slower (record=False says so beforehand)",
                stacklevel=2,
            )
            return self._meta_gradients(*tensors)
        # The next replay writes over these.
        return [replace(g, gradients=[None if x is None else x.clone() for x in g.gradients]) for g in groups]

    # -- some tasks after the others, and side by side -----------------------------------------------------------

    def tasks_together(self, support_x: Tensor) -> int:
        """How many of the tasks with supports ``(b, s, *item)`` are computed together."""
        if self.tasks_at_once is not None:
            return self.tasks_at_once
        if support_x.device.type != "cpu":
            return len(support_x)
        return max(1, self.numbers_on_cpu // support_x[0].numel())

    def groups_side_by_side(self, support_x: Tensor) -> int:
        """How many groups of the tasks with supports ``(b, s, *item)`` are computed at a time, if it can be so."""
        if support_x.device.type != "cpu":
            return 1
        threads = torch.get_num_threads() if self.threads is None else self.threads
        return min(threads, -(-len(support_x) // self.tasks_together(support_x)))

    def _each_group(self, method: str, *tensors: Tensor) -> list[Any]:
        """What a method gives for each group of tasks, in their order."""
        size = self.tasks_together(tensors[0])
        groups = list(zip(*(torch.split(x, size) for x in tensors), strict=True))
        learners: list[GradientLearner] = [self]
        threads = self.groups_side_by_side(tensors[0])
        if threads > 1 and not self._draws_random_numbers(method, *(x[:1] for x in tensors)):
            learners += self._copies(threads - 1)
        jobs = [partial(getattr(learners[i % len(learners)], method), *group) for i, group in enumerate(groups)]
        return side_by_side(jobs, len(learners))

    def _draws_random_numbers(self, method: str, *tensors: Tensor) -> bool:
        """Whether a method does, which is tried once."""
        key = method, self.training
        if key not in self._draws:
            before = torch.get_rng_state()
            getattr(self, method)(*tensors)
            self._draws[key] = not torch.equal(torch.get_rng_state(), before)
            torch.set_rng_state(before)
        return self._draws[key]

    def _copies(self, number: int) -> list[GradientLearner]:
        """Copies that share all parameters and buffers, because running a network functionally writes into it."""
        shared = {id(tensor): tensor for tensor in [*self.parameters(), *self.buffers()]}
        try:
            return [copy.deepcopy(self, dict(shared)) for _ in range(number)]
        except Exception:  # a module may hold anything; what cannot be copied runs alone
            return []

    def get_extra_state(self) -> dict[str, int]:
        """How many meta-steps were taken, for what is annealed."""
        return {"meta_steps": self.meta_steps}

    def set_extra_state(self, state: dict[str, int]) -> None:
        """See ``get_extra_state``."""
        self.meta_steps = state["meta_steps"]

    # -- the inner loop, in the order in which it runs -----------------------------------------------------------

    def enter(self, support_x: Tensor, support_y: Tensor, query_x: Tensor) -> Task:
        """The tasks as they enter the loop. Where the embedding is not adapted (ANIL) it is run here, once."""
        task = Task("", support_x, support_y, query_x)
        if all(name.startswith("head.") for name in self.adapted) and not self.step_norm:
            support = self._pass(task, "embedding.", {}, support_x, 0)
            query = self._query_pass(task, "embedding.", {}, support_x, query_x, self.steps)
            return Task("head.", support, support_y, query, task.found)
        return task

    def start(self, task: Task, *, attached: bool = True) -> Weights:
        """The weights before the first step, the same for each task.

        Args:
            task: The tasks.
            attached: Whether gradients flow back to the network's own parameters.
        """
        own = dict(self.network.named_parameters())
        weights = {}
        for name in self.adapted:
            weight = own[name].expand(len(task.support), *own[name].shape)
            attach = attached and weight.requires_grad
            weights[name] = weight if attach else weight.detach().requires_grad_()
        task.began = detached(weights)
        return weights

    def step(self, task: Task, weights: Weights, step: int, *, graph: bool) -> Weights:
        """One gradient step of each task on its support.

        Args:
            task: The tasks.
            weights: The weights before it.
            step: Its number, counted from 0.
            graph: Whether it can be differentiated; otherwise the gradient that it takes is a constant.

        Returns:
            The weights after it.
        """
        recomputed = graph and self.recompute
        run = checkpoint if recomputed else _call
        options = {"use_reentrant": False} if recomputed else {}
        after: Weights
        after, task.moments, losses, found = run(self._step, task, weights, task.moments, step, graph, **options)
        task.losses.append(losses.mean())
        task.found.extend(found)
        return after

    def _step(self, task: Task, weights: Weights, before: Weights, step: int, graph: bool) -> Any:
        found: list[Found] = []
        losses = self.support_losses(task, weights, step, found=found)
        total = losses.sum()  # the tasks do not meet, so this gives each task its own gradient
        if self.strength:
            total = total + self.strength / 2 * sum((weights[n] - task.began[n]).square().sum() for n in weights)
        gradients = torch.autograd.grad(total, list(weights.values()), create_graph=graph, allow_unused=True)
        after, moments = {}, {}
        for (name, weight), gradient in zip(weights.items(), gradients, strict=True):
            if gradient is None:  # of no effect on the answer
                after[name] = weight
                continue
            if self.inner_optimizer == "adam":
                moments[name] = torch.lerp(gradient.square(), before.get(name, torch.zeros_like(gradient)), DECAY)
                scale = moments[name] / (1 - DECAY ** (step + 1))
                # The root has no derivative at 0; there it is kept out of the graph.
                root = torch.where(scale > 0, torch.where(scale > 0, scale, 1).sqrt(), 0)
                gradient = gradient / (root + 1e-8)
            after[name] = weight - self.rates(name, step) * gradient
        return after, moments, losses.detach(), found

    def support_losses(self, task: Task, weights: Weights, step: int, *, found: list[Found] | None = None) -> Tensor:
        """The loss of each task on its support, ``(b,)``, after ``step`` steps."""
        return task_losses(self._pass(task, task.part, weights, task.support, step, found=found), task.support_y)

    def query(self, task: Task, weights: Weights, step: int) -> Tensor:
        """The answers ``(b, q, n)`` to the queries after ``step`` steps."""
        return self._query_pass(task, task.part, weights, task.support, task.query, step)

    def _query_pass(self, task: Task, part: str, weights: Weights, support: Tensor, query: Tensor, step: int) -> Tensor:
        if self.norm_mode != "inductive" or not batch_norm_layers(self._part(part)):
            return self._pass(task, part, weights, query, step)
        s = support.shape[1]
        return self._pass(task, part, weights, torch.cat([support, query], 1), step, counted=s)[:, s:]

    def _part(self, part: str) -> nn.Module:
        return self.network.get_submodule(part.removesuffix("."))

    def _pass(
        self,
        task: Task,
        part: str,
        weights: Weights,
        items: Tensor,
        step: int,
        *,
        counted: int | None = None,
        found: list[Found] | None = None,
    ) -> Tensor:
        """Run a part of the network; ``step`` steps were taken before."""
        index = min(step, self.steps) if self.per_step_norm else 0
        running = self.norm_mode == "running"

        def local(named: dict[str, Any]) -> dict[str, Any]:
            inside = {name: value for name, value in named.items() if f"{name}.".startswith(part)}
            return {f"{name}.".removeprefix(part).removesuffix("."): value for name, value in inside.items()}

        answer, statistics = run_tasks(
            self._part(part),
            local(weights),
            items,
            shared=local({key.replace("/", "."): weight[index] for key, weight in self.step_norm.items()}),
            counted=counted,
            averages=local(self._averages(index)) if running and not self.training else None,
            find=running and self.training,
        )
        if statistics:
            named = {f"{part}{layer}".removesuffix("."): pair for layer, pair in statistics.items()}
            (task.found if found is None else found).append((index, named))
        if part != "embedding.":
            self._check_answer(answer, items, task.support_y)
        return answer

    # -- batch norm's running averages ---------------------------------------------------------------------------

    def _averages(self, index: int) -> Statistics:
        buffers = dict(self.averages.named_buffers())
        layers = [name.removeprefix("mean/") for name in buffers if name.startswith("mean/")]
        return {key.replace("/", "."): (buffers[f"mean/{key}"][index], buffers[f"var/{key}"][index]) for key in layers}

    @torch.no_grad()
    def _update_averages(self, found: list[Found], tasks: int) -> None:
        """Move each average once, towards the mean over all tasks and passes of this meta-step."""
        gathered: dict[tuple[int, str], list[tuple[Tensor, Tensor]]] = {}
        for index, statistics in found:
            for layer, pair in statistics.items():
                gathered.setdefault((index, layer), []).append(pair)
        for (index, layer), pairs in gathered.items():
            for average, values in zip(self._averages(index)[layer], zip(*pairs, strict=True), strict=True):
                average.lerp_(torch.cat(values).mean(0).to(average.dtype), self.momentum)

    # -- what can go wrong ----------------------------------------------------------------------------------------

    def _check_answer(self, answer: Tensor, items: Tensor, truth: Tensor) -> None:
        if truth.is_floating_point():
            if answer.shape[2:] != truth.shape[2:]:
                raise ValueError(
                    f"the network answers with {tuple(answer.shape[2:])} values an item, but {tuple(truth.shape[2:])} "
                    f"are to be learned; change its last layer"
                )
        else:
            at_least = int(truth.max()) + 1 if truth.device.type == "cpu" else 0
            fits = answer.shape[2:] == (self.ways,) if self.ways is not None else answer.shape[2] >= at_least
            if answer.ndim != 3 or not fits:
                raise ValueError(
                    f"the network answers with {tuple(answer.shape[2:])} values an item, but episodes have "
                    f"{self.ways or at_least} ways; give it a last layer of as many, or give embedding_dim to have "
                    f"one put behind it"
                )

    def _check_finite(self, task: Task, outcome: Tensor) -> None:
        if bool(torch.isfinite(outcome).all()):
            return
        losses = [float(loss) for loss in task.losses]
        finite = [math.isfinite(loss) for loss in losses]
        if False in finite[:1]:
            raise FloatingPointError(
                f"the support's loss is {losses[0]:g} before the first inner step; the items or the weights are not "
                f"finite: look at the data, or lower the outer learning rate (--model.optimizer.lr)"
            )
        step = finite.index(False) if False in finite else len(losses)
        raise FloatingPointError(
            f"the inner loop diverged at step {step} with the rate {self.inner_rate:g}: the support's loss before each "
            f"step was {', '.join(f'{loss:.3g}' for loss in losses)}; lower inner_rate"
        )


def _call(function: Callable[..., Any], *args: Any) -> Any:
    return function(*args)


@dataclass(eq=False)
class _Group:
    """What the outer loop learns from some tasks: their summed loss, its gradient by each parameter, the answers."""

    loss: Tensor
    gradients: Sequence[Tensor | None]
    answer: Tensor
    found: list[Found]


def _sum_of(gradients: Sequence[Tensor | None]) -> Tensor | None:
    known = [gradient for gradient in gradients if gradient is not None]
    return sum(known[1:], known[0]) if known else None


class _WithGradient(torch.autograd.Function):
    """A scalar whose gradient is known already, so that no graph had to be kept."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: list[Tensor | None], scale: float, *parameters: Tensor) -> Tensor:
        """``value``, of which ``scale * gradients`` is the gradient by ``parameters``."""
        ctx.unused, ctx.scale = [gradient is None for gradient in gradients], scale
        ctx.save_for_backward(*(gradient for gradient in gradients if gradient is not None))
        return value.clone()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        """Scale what was computed."""
        saved = iter(ctx.saved_tensors)
        return None, None, None, *(None if unused else ctx.scale * upstream * next(saved) for unused in ctx.unused)
