"""Profiles of a step: one Chrome trace per phase."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from rlhfkernels.observer import Observer


class PhaseProfiler(Observer):
    """Profiles the first stretch of each phase and writes it to ``<directory>/<stem>-<phase>.json.gz``.

    Later stretches repeat the first. They are left out, as are shapes and stacks, to keep traces small.

    Attributes:
        paths: Traces written so far.
    """

    def __init__(self, directory: str | Path, stem: str, device: str | torch.device = "cpu") -> None:
        self._directory = Path(directory)
        self._stem = stem
        self._activities = [ProfilerActivity.CPU]
        self._device = torch.device(device)
        if self._device.type == "cuda":
            self._activities.append(ProfilerActivity.CUDA)
        self._running: tuple[str, profile] | None = None
        self._seen: set[str] = set()
        self.paths: list[Path] = []

    def enter_phase(self, name: str) -> None:
        """Starts the profiler if the phase is new and no other phase is being profiled."""
        if self._running is None and name not in self._seen:
            self._seen.add(name)
            self._running = name, profile(activities=self._activities)
            self._running[1].start()

    def exit_phase(self, name: str) -> None:
        """Stops the profiler and writes the trace."""
        if self._running is None or self._running[0] != name:
            return
        profiler = self._running[1]
        self._running = None
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        profiler.stop()
        self._directory.mkdir(parents=True, exist_ok=True)
        path = self._directory / f"{self._stem}-{name}.json.gz"
        profiler.export_chrome_trace(str(path))
        self.paths.append(path)
