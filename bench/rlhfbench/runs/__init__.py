"""Running a sweep: runner, fork server, worker, progress, environment, run folder."""
