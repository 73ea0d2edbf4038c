"""The rules of the contract, one module a subject; `memory_models.testing` puts a module to them."""
