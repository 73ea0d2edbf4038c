"""Memformer (Wu et al. 2020, arXiv:2010.06891): its place in the family.

The member is not written yet and nothing is exported.
"""

__distribution__ = "memory-models"

__all__: list[str] = []
