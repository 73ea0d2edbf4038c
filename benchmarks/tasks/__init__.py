"""The tasks, one file each; `benchmarks.task.tasks` names them."""
