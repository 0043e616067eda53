"""Running a sweep: fork server, worker, runner, progress, environment, run folder."""
