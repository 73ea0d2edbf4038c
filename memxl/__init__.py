"""Memory Transformer-XL: its place in the family.

The member is not written yet and nothing is exported.
"""

__distribution__ = "memory-models"

__all__: list[str] = []
