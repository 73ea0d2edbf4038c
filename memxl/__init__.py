"""Memory Transformer-XL: this package's place in the family; its member is not written yet and nothing is exported."""

__distribution__ = "memory-models"

__all__: list[str] = []
