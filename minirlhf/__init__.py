"""minirlhf: reinforcement learning from human feedback, small enough to read and verified by execution."""

__version__ = "0.1.0"
