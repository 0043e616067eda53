"""One training step of any method: it runs the stages of the method's program.

Shapes: n = sequences, b = data rows, p = prompt length, c = completion length.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rlhfkernels.algorithms import DERIVATIONS
from rlhfkernels.config.case import Case
from rlhfkernels.data.batch import Batch, chunks
from rlhfkernels.data.sources import SOURCES, Prompts, Source
from rlhfkernels.engine.engine import Engine
from rlhfkernels.errors import CaseError, DataError
from rlhfkernels.methods.method import Method
from rlhfkernels.methods.phases import ForwardPass, Phase
from rlhfkernels.methods.program import Derive, Generate, Optimize, Read
from rlhfkernels.models.loading import load_tokenizer
from rlhfkernels.observer import Observer
from rlhfkernels.ops.fast_paths import forget_fast_paths
from rlhfkernels.parallel.strategies import RoleOptimizer, Strategy
from rlhfkernels.parallel.world import ALONE, World
from rlhfkernels.training.gradients import PassForm
from rlhfkernels.training.optimizer_table import make_optimizer
from rlhfkernels.training.prepared import PreparedColumns
from rlhfkernels.training.quantities import QUANTITIES
from rlhfkernels.training.schedule import learning_rate
from rlhfkernels.training.sizes import BaseSizes, base_sizes
from rlhfkernels.training.stats import StepStats
from rlhfkernels.training.update import UpdatePhases

RewardFunction = Callable[[Batch], torch.Tensor]

# The column that a user's reward function fills, in place of the stage that reads it from the reward model.
SCORES = "scores"


def build_step(
    case: Case,
    *,
    reward_fn: RewardFunction | None = None,
    with_weights: bool = True,
    num_layers: int | None = None,
    world: World = ALONE,
    make_strategy: Callable[..., Strategy] | None = None,
) -> TrainingStep:
    """Loads what ``case`` names onto its device and returns its step.

    Args:
        case: what to build.
        reward_fn: scores a batch, [n], in place of the reward model, whose forward pass is then not run.
        with_weights: load real weights and data; without, random ones of the same shapes stand for them, as a planner
            on fake tensors needs.
        num_layers: build models without weights with their first layers alone.
        world: the ranks that share the case, of which this process is one.
        make_strategy: makes what divides the weights, in place of the case's; arguments as ``Strategy``.

    Raises:
        ModelError: the model cannot be loaded or is too short.
        CaseError: an option does not fit the model, or the method reads no scores that ``reward_fn`` could give.
        DataError: the data file cannot be used.

    Example:
        >>> case = Case(method="sft-lora", model="tiny", prompt_len=8, completion_len=8, batch_size=2)
        >>> stats = build_step(case).run()
        >>> sorted(stats)
        ['policy_grad_norm', 'policy_loss']
    """
    if reward_fn is not None and not _reads_scores(case.role_table):
        raise CaseError([f"reward_fn is given: method {case.method!r} reads no scores, so it must be none."])
    generator = None
    if with_weights:
        generator = torch.Generator(torch.device(case.device))
        # Every rank samples its own, and no rank of another seed the same.
        generator.manual_seed((case.seed * world.size + world.rank) % 2**63)
    engine = Engine(case, with_weights=with_weights, num_layers=num_layers, world=world, make_strategy=make_strategy)
    step = TrainingStep(case, engine, reward_fn, generator=generator, world=world)
    forget_fast_paths()
    return step


class TrainingStep:
    """A step that can be run again and again; every run takes the next batch of data.

    Attributes:
        case: what is run.
        engine: the models.
        world: the ranks that share the case.
        phases: the phases, in order: ``prepare``, where there is one, then those of every step.
        optimizers: one for each trained role that owns weights.
        released_sizes: of the bases that ``prepare`` has freed.
    """

    def __init__(
        self,
        case: Case,
        engine: Engine,
        reward_fn: RewardFunction | None,
        *,
        generator: torch.Generator | None,
        world: World = ALONE,
    ) -> None:
        self.case, self.world = case, world
        self.engine = engine
        self.method = engine.method
        self.phases: tuple[Phase, ...] = self.method.phases
        self._reward_fn = reward_fn
        self._options = case.options.flat()
        # The clipping is of a reward model's scores: those of a reward function are the user's own.
        self._derive_options = case.options if reward_fn is None else case.options.replace({"ppo.reward_clip": None})
        with_rows = engine.with_weights
        tokenizer = load_tokenizer(case.model) if case.data_file is not None and with_rows else None
        self._source: Source = SOURCES[self.method.source](
            case, engine.vocab_size, tokenizer, with_rows=with_rows, world=world
        )
        self._generator = generator
        self._prepared = PreparedColumns(self._source.num_rows)
        self._is_prepared = self.method.prepare is None
        self.released_sizes: dict[str, BaseSizes] = {}
        for base in engine.models:
            engine.check_lengths(base)
        for p in self.method.update_passes if with_rows else ():
            if PassForm(p, case.options).packs:
                engine.check_packing(p.weights.base)
        self._updates = UpdatePhases(case, engine, world)
        self._set_gradient_dtypes()
        self.optimizers = {
            stage.role: self._make_optimizer(stage, engine.parameters_of_role[stage.role])
            for phase in self.phases
            for stage in phase.stages
            if isinstance(stage, Optimize) and engine.parameters_of_role[stage.role]
        }

    def _set_gradient_dtypes(self) -> None:
        """Sets the dtype in which each trained weight's gradient is kept and added up; see ``grad_accum_dtype``."""
        passes = [p.weights for p in self.method.update_passes]
        has_several = self.case.micro_batch_size < self.case.mini_batch_size or len(set(passes)) < len(passes)
        has_several |= any(PassForm(p, self.case.options).in_two_passes for p in self.method.update_passes)
        name = self.case.options.optimizer.grad_accum_dtype or ("float32" if has_several else None)
        if name is not None and self.case.options.parallel.strategy is None:  # else the library decides
            for parameter in self.trained_parameters():
                parameter.grad_dtype = torch.promote_types(parameter.dtype, getattr(torch, name))

    def _make_optimizer(self, stage: Optimize, parameters: list[nn.Parameter]) -> RoleOptimizer:
        own = None if stage.learning_rate is None else self._options[stage.learning_rate]
        options = self.case.options.optimizer
        divided = self.engine.strategy.optimizer(stage.role, functools.partial(learning_rate, options, own))
        return divided or make_optimizer(
            options,
            parameters,
            learning_rate=own,
            computes=self.engine.with_weights,
            all_ranks=self.engine.strategy.squared_norm,
        )

    @property
    def trunk_used(self) -> str:
        """The implementation of the trunks: ``fast``, or ``plain`` where ``fast`` does not cover the architecture.

        ``fast, plain`` or ``plain, fast`` where a reward model is of another architecture: the actor's comes first.
        """
        return _joined(trunk.name for trunk in self.engine.trunks.values())

    @property
    def attention_used(self) -> str:
        """The attention implementation of the trunks: ``sdpa`` or ``eager``, or both as in ``trunk_used``."""
        return _joined(model.attention for model in self.engine.models.values())

    @property
    def backend_used(self) -> str:
        """The backend of the ops: ``triton``, ``native`` or ``torch``."""
        return self.engine.backend

    @property
    def sequences_per_row(self) -> int:
        """Sequences of one data row."""
        return self.case.sequences_per_row

    def rewind(self) -> None:
        """Has the next step read the first rows of the data file again."""
        self._source.rewind()

    def data_summary(self) -> dict[str, Any]:
        """The ``prompts`` object of a record."""
        return self._source.summary()

    def trained_parameters(self) -> list[nn.Parameter]:
        """Every weight that is trained."""
        return [p for parameters in self.engine.parameters_of_role.values() for p in parameters]

    def persistent_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(part, tensor) of all that lives between steps: weights, master copies, moments, prepared columns."""
        yield from self.engine.persistent_tensors()
        yield from self.engine.strategy.tensors()
        for optimizer in self.optimizers.values():
            yield from (("optimizer", tensor) for tensor in optimizer.tensors())
        yield from (("rollout", tensor) for tensor in (*self._source.tensors(), *self._prepared.columns.values()))

    def save(self, folder: Path) -> None:
        """Writes every trained weight: adapter sets as PEFT, whole models as transformers reads them, scalar heads."""
        self.engine.save(folder)

    def sequence_lengths(self) -> Counter[tuple[int, int]]:
        """Tokens of prompt and completion of the data set's sequences, counted; those of the case without a file."""
        return self._source.lengths() or Counter([(self.case.prompt_len, self.case.completion_len)])

    @property
    def num_data_rows(self) -> int:
        """Data rows of the data set, which ``prepare`` reads."""
        return self._source.num_rows

    @torch.no_grad()
    def prepare(self, observer: Observer | None = None, *, num_batches: int | None = None) -> None:
        """Phase ``prepare``: reads the columns that a step does not read itself, for every row of the data set.

        Bases that no step reads are freed then, so a further call does nothing. ``run`` calls it where it has not been
        called.

        Args:
            observer: told of the phase.
            num_batches: read only so many batches, and free nothing; ``None`` is all.
        """
        phase, observer = self.method.prepare, observer or Observer()
        if phase is None or self._is_prepared:
            return
        stages = [stage for stage in phase.stages if isinstance(stage, Read)]
        with observer.phase(phase.name):
            for batch in itertools.islice(self._source.data_set(self._generator), num_batches):
                self._read(phase, batch, observer)
                for stage in stages:
                    self._prepared.keep(stage.into, batch)
                observer.tag("rollout", self._prepared.columns.values())
            if num_batches is None:
                self._is_prepared = True
                for base in set(self.engine.models) - self.method.bases_of_steps:
                    self.released_sizes[base] = base_sizes(self.engine, base)
                    self.engine.release(base)

    def run(self, observer: Observer | None = None) -> StepStats:
        """One complete step on the next batch of data."""
        observer = observer or Observer()
        batch, stats = self.infer(observer)
        self.update(batch, observer, stats)
        return stats

    def infer(self, observer: Observer | None = None) -> tuple[Batch, StepStats]:
        """The inference phases: the next batch of data, with the columns that the update reads.

        Raises:
            NumericalError: a token was sampled from logits that are not finite.
            DataError: the reward function returned no tensor of one score for each sequence.
        """
        observer = observer or Observer()
        stats = StepStats()
        batch: Batch | None = None
        if not self._is_prepared:
            self.prepare(observer)
        if self.method.generate is None:
            first = next(phase.name for phase in self.phases if phase.kind != "prepare")
            with observer.phase(first):
                batch = self._next_batch()
                self._prepared.fill(batch)
                observer.tag("rollout", batch.tensors())
        for phase in self.phases:
            if phase.kind == "inference":
                with observer.phase(phase.name):
                    batch = _INFERENCE[type(phase.stages[0])](self, phase, batch, stats, observer)
                for stage in phase.stages:
                    if isinstance(stage, Generate):  # behind the phase: the check waits for the device
                        self.engine.check_sampled(stage.role, batch)
        assert batch is not None
        return batch, stats

    def _next_batch(self) -> Batch:
        batch = self._source.next_batch(self._generator)
        assert isinstance(batch, Batch), "a source of prompts needs a stage that generates"
        return batch

    def _generate(self, phase: Phase, batch: Batch | None, stats: StepStats, observer: Observer) -> Batch:
        """Phase ``generate``: a batch of prompts and its sampled completions."""
        (stage,) = phase.stages
        assert isinstance(stage, Generate)
        prompts = self._source.next_batch(self._generator)
        assert isinstance(prompts, Prompts)
        samples = 1 if stage.samples is None else self._options[stage.samples]
        return self.engine.generate(stage.role, prompts, self._generator, observer, samples=samples)

    @torch.no_grad()
    def _score(self, phase: Phase, batch: Batch | None, stats: StepStats, observer: Observer) -> Batch:
        """Phase ``score``: reads the columns of all forward passes, then derives the rest."""
        assert batch is not None
        self._read(phase, batch, observer)
        if self._reward_fn is not None and SCORES in batch.columns:
            batch[SCORES].copy_(_checked_scores(self._reward_fn(batch), batch.num_sequences))
        for stage in phase.stages:
            if isinstance(stage, Derive):
                stats.metrics |= DERIVATIONS[stage.function](batch, self._derive_options, self.world.all_sum)
        observer.tag("rollout", batch.tensors())
        return batch

    def _read(self, phase: Phase, batch: Batch, observer: Observer) -> None:
        """Fills the columns that the passes of ``phase`` read, micro-batch by micro-batch."""
        for read in [stage for p in phase.passes for stage in p.stages if isinstance(stage, Read)]:
            batch[read.into] = QUANTITIES[read.quantity].new_column(batch)
        observer.tag("rollout", batch.tensors())
        passes = self.passes_run(phase)
        for rows in chunks(range(batch.num_rows), self.case.micro_batch_size):
            part = batch.select(rows)
            for p in passes:
                self.engine.read(p.weights, functools.partial(self._read_pass, p, part))

    def _read_pass(self, p: ForwardPass, part: Batch) -> None:
        """Fills the columns of a micro-batch that one pass reads."""
        hidden = self.engine.hidden(p.weights, part.tokens, part.attention_mask, start=part.prompt_len - 1)
        for stage in p.stages:
            assert isinstance(stage, Read)
            part[stage.into].copy_(QUANTITIES[stage.quantity].read(self.engine, stage.role, hidden, part))

    def passes_run(self, phase: Phase) -> list[ForwardPass]:
        """The passes of a phase that reads: without those of scores that a reward function gives."""
        return [p for p in map(self._without_reward, phase.passes) if p.stages]

    def _without_reward(self, p: ForwardPass) -> ForwardPass:
        """The pass without what a reward function gives."""
        if self._reward_fn is None:
            return p
        kept = tuple(stage for stage in p.stages if isinstance(stage, Read) and stage.into != SCORES)
        return dataclasses.replace(p, stages=kept)

    def update(self, batch: Batch, observer: Observer | None = None, stats: StepStats | None = None) -> StepStats:
        """The update phases; see ``UpdatePhases.run``."""
        observer = self.engine.strategy.observer = observer or Observer()
        stats = StepStats() if stats is None else stats  # an empty mapping is false
        self._updates.run(batch, observer, stats, self.optimizers)
        return stats


def _reads_scores(method: Method) -> bool:
    return any(isinstance(stage, Read) and stage.into == SCORES for stage in method.program)


def _checked_scores(scores: object, num_sequences: int) -> torch.Tensor:
    """Refuses what torch would broadcast to [n], or could not read."""
    found = f"an object of type {type(scores).__name__}"
    if isinstance(scores, torch.Tensor):
        if scores.shape == (num_sequences,):
            return scores
        found = f"a tensor of shape {list(scores.shape)}"
    raise DataError(
        f"reward_fn returned {found}: it must be a tensor of shape [{num_sequences}], one score for each sequence."
    )


def _joined(names: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(names))


# What runs an inference phase, by the kind of its first stage.
_INFERENCE = {
    Generate: TrainingStep._generate,
    Read: TrainingStep._score,
    Derive: TrainingStep._score,
}
