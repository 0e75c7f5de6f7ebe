"""The position of a run in all of its stages, and the time that is left for them, from the events of its jobs."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from kdpipe.pipeline.terminal.rate import duration_text
from kdpipe.stages.runtime.events import ProgressEvent


@dataclass(frozen=True)
class PlannedJob:
    """A job that a run will do, or skip.

    Attributes:
        stage: The command, as in its events.
        name: Its name in its events.
        kind: Jobs of one kind take the same time for the same work.
        work: Its epochs; of a store, the epochs that would cost as much.
        seed: Its number among the seeds, from 1; 0 if it has none.
    """

    stage: str
    name: str
    kind: str
    work: float
    seed: int = 0


class WholeRun:
    """The position in the jobs of a run. Jobs that were done before, or come from elsewhere, are passed over."""

    def __init__(self, jobs: Sequence[PlannedJob]) -> None:
        self.jobs, self.stages = list(jobs), list(dict.fromkeys(job.stage for job in jobs))
        self.num_seeds = max((job.seed for job in jobs), default=0)
        self._places = {(job.stage, job.name): place for place, job in enumerate(self.jobs)}
        self._place, self._share = 0, 0.0
        self._begun: tuple[int, float, float] | None = None  # place, share and time of a job's first event
        self._pace: dict[str, float] = {}  # seconds for each unit of work, by kind
        self._updated_at = time.monotonic()

    def update(self, event: ProgressEvent) -> None:
        """Follow an event."""
        first = next((place for place, job in enumerate(self.jobs) if job.stage == event.stage), None)
        place = self._places.get((event.stage, event.job), first)
        if place is None or place < self._place:
            return
        is_job, now = (event.stage, event.job) in self._places, time.monotonic()
        if place > self._place:
            self._place, self._share = place, 0.0
        if is_job:
            self._share = event.step / max(1, event.total)
            if self._begun is None or self._begun[0] != place:
                self._begun = place, self._share, now
            done = (self._share - self._begun[1]) * self.jobs[place].work
            if done > 0:
                self._pace[self.jobs[place].kind] = (now - self._begun[2]) / done
        self._updated_at = now

    def left_s(self) -> float | None:
        """Return the seconds left for all jobs; None before the pace of one is known."""
        if not self._pace:
            return None
        left = sum(self._of(job) for job in self.jobs[self._place + 1 :])
        left += (1 - self._share) * self._of(self.jobs[self._place])
        return max(0.0, left - (time.monotonic() - self._updated_at))

    @property
    def num_done(self) -> int:
        """The number of jobs that are done."""
        return self._place + (self._share >= 1)

    def position(self) -> str:
        """Return the position, such as "stage 3 of 4, seed 1 of 5"."""
        job = self.jobs[self._place]
        seed = f", seed {job.seed} of {self.num_seeds}" if job.seed and self.num_seeds > 1 else ""
        return f"stage {self.stages.index(job.stage) + 1} of {len(self.stages)}{seed}"

    def time_left(self) -> str:
        """Return the time that is left for all, such as "about 12 min left"; empty if it is not known."""
        left = self.left_s()
        return "" if left is None else f"about {duration_text(left)} left for all"

    def _of(self, job: PlannedJob) -> float:
        """Return the seconds of a whole job: those that its kind took, or on average those of its stage, or of all."""
        of_stage = {each.kind for each in self.jobs if each.stage == job.stage}
        known = self._pace.get(job.kind)
        if known is None:
            paces = [pace for kind, pace in self._pace.items() if kind in of_stage] or list(self._pace.values())
            known = sum(paces) / len(paces)
        return known * job.work
