"""The tasks, one file each: a class with a `name` in a file here is a task (`benchmarks.task.tasks`)."""
