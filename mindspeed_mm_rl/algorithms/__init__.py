"""Advantages, losses, KL terms and group filters: pure functions of tensors, put together in recipes.py."""
