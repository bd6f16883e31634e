"""Optimisers of sharded rows and of replicated tensors."""
