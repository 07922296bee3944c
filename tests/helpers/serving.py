"""Continuous batching in plain Python: the reference that the compiled loops are held to."""

from __future__ import annotations

import math
from dataclasses import dataclass, field


@dataclass
class Job:
    """A request: prompt and answer tokens, what is computed, and when its first and last token came."""

    prompt: int
    answer: int
    goal: int = 0
    done: int = 0
    made: int = 0
    preempted: int = 0
    first: float = math.nan
    end: float = math.nan

    def __post_init__(self) -> None:
        self.goal = self.prompt


@dataclass
class Instance:
    """One instance whose steps take `seconds(decoding, prompt tokens)`."""

    slots: int
    budget: int
    cache: int
    mixed: bool
    running: list[Job] = field(default_factory=list)
    queue: list[Job] = field(default_factory=list)

    def plan(self) -> list[tuple[Job, int]]:
        """Tokens of each running request in the next step."""
        left, chosen, full = self.budget, [], False
        held = sum(job.done for job in self.running)
        waiting = list(self.running)
        while waiting:
            job = waiting.pop(0)
            tokens = 1 if job.done >= job.goal else min(job.goal - job.done, left)
            while held + tokens > self.cache and len(self.running) > 1:
                full, last = True, self.running.pop()
                held -= last.done
                last.goal, last.done, last.preempted = last.prompt + last.made, 0, last.preempted + 1
                self.queue.insert(0, last)
                waiting = [other for other in waiting if other is not last]
                if last is job:
                    break
            if job not in self.running:
                break
            chosen.append((job, tokens))
            held, left = held + tokens, left - tokens
        while not full and self.queue and len(self.running) < self.slots and left > 0:
            if held + self.queue[0].goal > self.cache and self.running:
                break
            job = self.queue.pop(0)
            tokens = min(job.goal, left)
            self.running.append(job)
            chosen.append((job, tokens))
            held, left = held + tokens, left - tokens
        if not self.mixed and any(job.done < job.goal and tokens for job, tokens in chosen):
            chosen = [(job, 0 if job.done >= job.goal else tokens) for job, tokens in chosen]
        return chosen

    def finish(self, chosen: list[tuple[Job, int]], now: float) -> None:
        """What a step made."""
        for job, tokens in chosen:
            job.done += tokens
            if tokens and job.done >= job.goal:
                job.made += 1
                if job.made == 1:
                    job.first = now
            if job.made >= job.answer:
                job.end = now
                self.running.remove(job)


def run_one(jobs: list[tuple[float, Job]], instance: Instance, seconds: float) -> None:
    """Serve jobs that come at their times on one instance whose steps all take `seconds`."""
    coming, ends, step = sorted(jobs, key=lambda item: item[0]), math.inf, []
    while coming or ends < math.inf:
        if coming and coming[0][0] < ends:
            now, job = coming.pop(0)
            instance.queue.append(job)
            if ends < math.inf:
                continue
        else:
            now = ends
            instance.finish(step, now)
        step = instance.plan()
        ends = now + seconds if any(tokens for _, tokens in step) else math.inf
