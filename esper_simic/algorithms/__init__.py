"""Reinforcement-learning algorithms: tensors in, tensors out, one paper a file."""
