"""The comparison: tasks, controls, training, results and reports behind the command `memory-bench`."""

__all__: list[str] = []
__distribution__ = "memory-models"
