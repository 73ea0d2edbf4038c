"""Controls: what a memory must beat (`window`, `gru`, `transformer-xl`) and what it may hope for (`full`).

They keep the contract of every member and are built from the same transformer parts.
"""
