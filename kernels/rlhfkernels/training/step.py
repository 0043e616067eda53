"""One complete PPO step of any method: generate, score, update, optimize, as its role table says.

Shapes: b = batch, p = prompt length, c = completion length.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rlhfkernels.algorithms.advantages import gae, shaped_rewards, whiten
from rlhfkernels.algorithms.ppo import policy_loss, value_loss
from rlhfkernels.config.case import Case
from rlhfkernels.data.rollout import PromptSource, Rollout
from rlhfkernels.engine.engine import Engine
from rlhfkernels.errors import NumericalError
from rlhfkernels.methods.table import Pass, Phase, RoleName, update_phase
from rlhfkernels.models.loading import load_tokenizer
from rlhfkernels.observer import Observer
from rlhfkernels.training.optimizers import OPTIMIZERS, STAND_INS, Optimizer

RewardFunction = Callable[[Rollout], torch.Tensor]
Rows = slice | Sequence[int]


@dataclasses.dataclass(kw_only=True, slots=True)
class StepStats:
    """What a step says of itself; scalars on the device, so that reading them is the caller's wait.

    Attributes:
        score: mean of the reward model's scores.
        kl: mean over real tokens of log π − log π_ref, the k1 estimate of what is penalised, of the old policy.
        ratio_error: largest |ρ − 1| of the first update pass: 0 up to rounding.
        losses: role to the loss of the last mini-batch.
        grad_norms: role to the gradient norm before clipping of the last mini-batch.
    """

    score: torch.Tensor
    kl: torch.Tensor
    ratio_error: torch.Tensor | None = None
    losses: dict[RoleName, torch.Tensor] = dataclasses.field(default_factory=dict)
    grad_norms: dict[RoleName, torch.Tensor] = dataclasses.field(default_factory=dict)

    def check_finite(self) -> None:
        """Raises NumericalError if a loss, a gradient norm or the KL is not finite."""
        named = {"kl": self.kl, "score": self.score}
        named |= {f"{role} loss": value for role, value in self.losses.items()}
        named |= {f"{role} gradient norm": value for role, value in self.grad_norms.items()}
        for name, value in named.items():
            if not math.isfinite(float(value)):
                raise NumericalError(f"{name} is {float(value)}: the step's numbers must be finite.")


def build_step(case: Case, *, reward_fn: RewardFunction | None = None, with_weights: bool = True) -> PPOStep:
    """Loads what ``case`` names onto its device and returns its step.

    Args:
        case: what to build.
        reward_fn: scores a rollout, [b], in place of the reward model, whose pass is then not run.
        with_weights: load real weights and prompts; without, random ones of the same shapes stand for them, as a
            planner on fake tensors wants it.

    Raises:
        ModelError: the model cannot be loaded or is too short.
        CaseError: an option does not fit the model.
        PromptsError: the prompts file cannot be used.
    """
    if not with_weights:
        return PPOStep(case, Engine(case, with_weights=False), reward_fn, generator=None)
    return PPOStep(case, Engine(case), reward_fn, generator=_generator(torch.device(case.device), case.seed))


class PPOStep:
    """A PPO step that can be run again and again; every run takes the next batch of prompts.

    Attributes:
        case: what is run.
        engine: the models.
        phases: the phases of a step, in order.
        optimizers: one for each trained role that owns weights.
    """

    def __init__(
        self, case: Case, engine: Engine, reward_fn: RewardFunction | None, *, generator: torch.Generator | None
    ) -> None:
        self.case = case
        self.engine = engine
        self.phases: tuple[Phase, ...] = engine.method.phases
        self._reward_fn = reward_fn
        tokenizer = load_tokenizer(case.model) if case.options.data.prompts is not None else None
        actor = engine.models[engine.method.roles["actor"].base]
        self._prompts = PromptSource(case, actor.vocab_size, tokenizer)
        self._generator = generator
        self._order = random.Random(case.seed)
        self.optimizers = {
            role: self._make_optimizer(role, parameters)
            for role, parameters in engine.parameters_of_role.items()
            if parameters
        }

    def _make_optimizer(self, role: RoleName, parameters: list[nn.Parameter]) -> Optimizer:
        options = self.case.options
        optimizers = OPTIMIZERS if self.engine.with_weights else STAND_INS
        return optimizers[options.optimizer.name](
            parameters,
            lr=_LEARNING_RATES[role](options),
            warmup_steps=options.optimizer.warmup_steps,
            total_steps=options.optimizer.max_steps,
            max_grad_norm=options.optimizer.max_grad_norm,
            weight_decay=options.optimizer.weight_decay,
            eps=options.optimizer.adam_epsilon,
        )

    @property
    def num_prompts_truncated(self) -> int:
        """Prompts that were longer than the prompt length and lost their beginning."""
        return self._prompts.num_truncated

    @property
    def engine_taken(self) -> str:
        """How the actor's trunk is run: as ``Options.engine`` asks, or ``plain`` where that does not cover it."""
        return self.engine.trunks[self.engine.method.roles["actor"].base].name

    @property
    def kernels_taken(self) -> str:
        """How ops are computed: ``triton``, ``native`` or ``torch``; see ``Options.kernels``."""
        return self.engine.kernels

    def prompt_summary(self) -> dict[str, Any]:
        """The ``prompts`` object of a record."""
        return self._prompts.summary()

    def trained_parameters(self) -> list[nn.Parameter]:
        """Every weight that is trained."""
        return [p for parameters in self.engine.parameters_of_role.values() for p in parameters]

    def persistent_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(part, tensor) of all that lives between steps: weights, master copies, moments."""
        yield from self.engine.persistent_tensors()
        for optimizer in self.optimizers.values():
            yield from (("optimizer", tensor) for tensor in optimizer.tensors())

    def save(self, folder: Path) -> None:
        """Writes the adapter sets, as plain PEFT reads them, and the scalar heads."""
        self.engine.save(folder)

    def run(self, observer: Observer | None = None) -> StepStats:
        """One complete step on the next batch of prompts."""
        observer = observer or Observer()
        rollout = self.generate(observer)
        self.score(rollout, observer)
        return self.update(rollout, observer)

    def generate(self, observer: Observer) -> Rollout:
        """Phase ``generate``: a batch of prompts and its sampled completions."""
        with observer.phase("generate"):
            prompts, mask = self._prompts.next_batch(self._generator)
            return self.engine.generate(prompts, mask, self._generator, observer)

    @torch.no_grad()
    def score(self, rollout: Rollout, observer: Observer) -> None:
        """Phase ``score``: fills in what the other roles say, the advantages and the returns."""
        options = self.case.options
        with observer.phase("score"):
            _make_room(rollout, bootstrap=options.ppo.bootstrap_truncated)
            observer.tag("rollout", rollout.tensors())
            for rows in self._micro_batches(range(self.case.batch_size)):
                part = _select(rollout, rows)
                for p in self._score_passes():
                    hidden = self._hidden(p, part)
                    for role in p.roles:
                        _READERS[role](self.engine, hidden, part)
                    del hidden
            if self._reward_fn is not None:
                rollout.scores.copy_(self._reward_fn(rollout))  # type: ignore[union-attr]
            if options.ppo.reward_clip is not None:
                rollout.scores.clamp_(-options.ppo.reward_clip, options.ppo.reward_clip)  # type: ignore[union-attr]
            self._advantages(rollout)
            observer.tag("rollout", rollout.tensors())

    def _hidden(self, p: Pass, part: Rollout, *, train: bool = False) -> torch.Tensor:
        """The pass's hidden states [b, c + 1, d] from the last prompt token on: nothing reads those before."""
        start = part.prompt_len - 1
        return self.engine.hidden(p, part.tokens, part.attention_mask, start=start, train=train)

    def _score_passes(self) -> list[Pass]:
        """The method's passes; without the reward model where a function stands for it."""
        skipped = {"reward"} if self._reward_fn is not None else set()
        passes = [
            dataclasses.replace(p, roles=tuple(role for role in p.roles if role not in skipped))
            for p in self.engine.method.score_passes
        ]
        return [p for p in passes if p.roles]

    def _advantages(self, rollout: Rollout) -> None:
        options = self.case.options
        values, scores, reference = rollout.values, rollout.scores, rollout.reference_logprobs
        assert values is not None
        assert scores is not None
        assert reference is not None
        rewards = shaped_rewards(rollout.logprobs, reference, scores, rollout.mask, kl_coef=options.ppo.kl_coef)
        terminal = rollout.terminal_values
        if terminal is not None and options.rollout.stop_token_id is not None:
            terminal.mul_(~(rollout.completions * rollout.mask == options.rollout.stop_token_id).any(1))
        advantages, rollout.returns = gae(
            rewards, values, rollout.mask, gamma=options.ppo.gamma, lam=options.ppo.lam, terminal_values=terminal
        )
        rollout.advantages = whiten(advantages, rollout.mask)

    def update(self, rollout: Rollout, observer: Observer) -> StepStats:
        """The update phases: every epoch's mini-batches, one graph at a time, and an optimizer step after each."""
        assert rollout.scores is not None
        assert rollout.reference_logprobs is not None
        with torch.no_grad():
            gap = (rollout.logprobs - rollout.reference_logprobs) * rollout.mask
            stats = StepStats(score=rollout.scores.mean(), kl=gap.sum() / rollout.mask.sum())
        for _ in range(self.case.options.ppo.num_ppo_epochs):
            for indices in self._mini_batches():
                num_tokens = _select(rollout, _rows(indices)).mask.sum()
                stats.losses = {}
                for p in self.engine.method.update_passes:
                    with observer.phase(update_phase(p)):
                        self._differentiate(p, rollout, indices, num_tokens, stats)
                with observer.phase("optimize"):
                    stats.grad_norms = {role: optimizer.step() for role, optimizer in self.optimizers.items()}
        return stats

    def _differentiate(
        self, p: Pass, rollout: Rollout, indices: Sequence[int], num_tokens: torch.Tensor, stats: StepStats
    ) -> None:
        """Adds the gradient of one pass over one mini-batch; each micro-batch's graph ends before the next begins."""
        for rows in self._micro_batches(indices):
            part = _select(rollout, rows)
            hidden = self._hidden(p, part, train=True)
            losses = {role: _OBJECTIVES[role](self, hidden, part, num_tokens, stats) for role in p.roles}
            torch.stack(list(losses.values())).sum().backward()  # type: ignore[no-untyped-call]
            for role, loss in losses.items():
                stats.losses[role] = stats.losses.get(role, 0) + loss.detach()

    def policy_objective(
        self, hidden: torch.Tensor, part: Rollout, num_tokens: torch.Tensor, stats: StepStats
    ) -> torch.Tensor:
        """The actor's loss over these rows of a mini-batch of ``num_tokens`` real tokens."""
        options = self.case.options
        assert part.advantages is not None
        logprobs, entropies = self.engine.completion_logprobs(
            "actor", hidden, part, entropy=options.ppo.entropy_coef != 0
        )
        loss = policy_loss(
            logprobs, part.logprobs, part.advantages, part.mask, clip_range=options.ppo.cliprange, num_tokens=num_tokens
        )
        if entropies is not None:
            loss = loss - options.ppo.entropy_coef * (entropies * part.mask).sum() / num_tokens
        if stats.ratio_error is None:
            with torch.no_grad():
                stats.ratio_error = (((logprobs - part.logprobs).exp() - 1) * part.mask).abs().max()
        return loss

    def value_objective(
        self, hidden: torch.Tensor, part: Rollout, num_tokens: torch.Tensor, stats: StepStats
    ) -> torch.Tensor:
        """The critic's loss over these rows of a mini-batch of ``num_tokens`` real tokens."""
        del stats
        options = self.case.options
        assert part.values is not None
        assert part.returns is not None
        values = self.engine.completion_values("critic", hidden, part)
        loss = value_loss(
            values, part.values, part.returns, part.mask, clip_range=options.ppo.cliprange_value, num_tokens=num_tokens
        )
        return options.ppo.vf_coef * loss

    def _mini_batches(self) -> Iterator[Sequence[int]]:
        """The rows of every mini-batch of one epoch; shuffled only where there are several."""
        order: Sequence[int] = range(self.case.batch_size)
        if self.case.options.ppo.num_mini_batches > 1:
            order = self._order.sample(order, len(order))
        size = self.case.mini_batch_size
        for start in range(0, len(order), size):
            yield order[start : start + size]

    def _micro_batches(self, indices: Sequence[int]) -> Iterator[Rows]:
        size = self.case.micro_batch_size
        for start in range(0, len(indices), size):
            yield _rows(indices[start : start + size])


_OBJECTIVES = {"actor": PPOStep.policy_objective, "critic": PPOStep.value_objective}
_LEARNING_RATES = {
    "actor": lambda options: options.optimizer.learning_rate,
    "critic": lambda options: (
        options.optimizer.learning_rate
        if options.ppo.critic_learning_rate is None
        else options.ppo.critic_learning_rate
    ),
}


def _read_reference(engine: Engine, hidden: torch.Tensor, part: Rollout) -> None:
    assert part.reference_logprobs is not None
    part.reference_logprobs.copy_(engine.completion_logprobs("reference", hidden, part)[0])


def _read_reward(engine: Engine, hidden: torch.Tensor, part: Rollout) -> None:
    assert part.scores is not None
    part.scores.copy_(engine.last_scalar("reward", hidden, part))


def _read_critic(engine: Engine, hidden: torch.Tensor, part: Rollout) -> None:
    assert part.values is not None
    part.values.copy_(engine.completion_values("critic", hidden, part))
    if part.terminal_values is not None:
        part.terminal_values.copy_(engine.last_scalar("critic", hidden, part))


# What ``score`` takes from a pass for each role that shares it.
_READERS = {"reference": _read_reference, "reward": _read_reward, "critic": _read_critic}


def _make_room(rollout: Rollout, *, bootstrap: bool) -> None:
    rollout.reference_logprobs = torch.zeros_like(rollout.logprobs)
    rollout.values = torch.zeros_like(rollout.logprobs)
    rollout.scores = torch.zeros_like(rollout.logprobs[:, 0])
    rollout.terminal_values = torch.zeros_like(rollout.scores) if bootstrap else None


def _rows(indices: Sequence[int]) -> Rows:
    """A range becomes a slice, so that its rows are views and not copies."""
    return slice(indices.start, indices.stop) if isinstance(indices, range) else list(indices)


def _select(rollout: Rollout, rows: Rows) -> Rollout:
    """The given rows of every tensor: views for a slice, copies for a list."""
    if isinstance(rows, slice) and rows == slice(0, len(rollout.tokens)):
        return rollout
    tensors: dict[str, Any] = {
        field.name: value[rows]
        for field in dataclasses.fields(rollout)
        if isinstance(value := getattr(rollout, field.name), torch.Tensor)
    }
    return dataclasses.replace(rollout, **tensors)


def _generator(device: torch.device, seed: int) -> torch.Generator:
    generator = torch.Generator(device)
    generator.manual_seed(seed)
    return generator
