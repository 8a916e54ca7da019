"""A picture's place in the batcher."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

from saferedir.runtime.job import Array, Denoised, Job
from saferedir.runtime.prediction import Ahead

#: Called after every step with (steps done, steps in all), on the batcher's thread.
StepCallback = Callable[[int, int], None]
#: Called with an estimate of the finished picture, a latent [C, h, w], on the batcher's thread.
PreviewCallback = Callable[[Array], None]


@dataclass(order=True)
class Ticket:
    """A picture's place in the batcher, in the order in which pictures are served. Callbacks are set before it is submitted."""

    #: Free rows go to the lowest: when it came, brought forward by its priority, and its number.
    urgency: tuple[float, int]
    #: Turns go to the step graph of the lowest: by when it should be drawn.
    due: float = field(compare=False)
    #: The step graph that is to draw it, and in how many steps.
    engine: str = field(compare=False)
    steps: int = field(compare=False)
    #: By when it is to be drawn, as `time.monotonic` counts; past it, it fails. None: whenever.
    deadline: float | None = field(compare=False, default=None)
    #: When it was expected to be drawn, as it was given.
    predicted: float = field(compare=False, default=0.0)
    on_step: StepCallback | None = field(compare=False, default=None)
    #: After which steps a preview is made.
    previewed: frozenset[int] = field(compare=False, default=frozenset())
    #: Given a preview once the next step's detection has seen it, and only where that finds no concept.
    on_preview: PreviewCallback | None = field(compare=False, default=None)
    #: A preview that no decision has seen yet.
    held: Array | None = field(compare=False, default=None)
    job: Job | None = field(compare=False, default=None)
    #: Whether it was handed over to be drawn: then `future` ends.
    submitted: bool = field(compare=False, default=False)
    future: Future[Denoised] = field(compare=False, default_factory=Future)
    cancelled: bool = field(compare=False, default=False)

    def __post_init__(self) -> None:
        self.future.set_running_or_notify_cancel()  # nobody but the batcher ends it

    @property
    def done(self) -> int:
        """Steps that are done."""
        return 0 if self.job is None else self.job.done

    def cancel(self) -> None:
        """Let it leave at the next step; `future` then raises `CancelledError`."""
        self.cancelled = True

    @property
    def ahead(self) -> Ahead:
        return Ahead(self.urgency, self.due, self.engine, self.steps - self.done)
