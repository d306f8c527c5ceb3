"""Rewards: verifiers by name, graded in processes that can be killed, and a reward model in one of its own.

Only model.py imports torch: graders must start fast.
"""
