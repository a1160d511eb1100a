"""How the whole suite runs: reproducible examples, no deadline, one thread unless the caller says so."""

import os
import sys
from pathlib import Path

import torch
from hypothesis import HealthCheck, settings

# Test helpers are imported as `tests.<room>.<helper>`, from wherever pytest was started.
ROOT = str(Path(__file__).resolve().parents[1])
if ROOT not in sys.path:
    sys.path.insert(0, ROOT)

# No deadline: the first torch.func or compile call takes seconds. Derandomised: a red run is red again.
settings.register_profile(
    "minirlhf",
    deadline=None,
    derandomize=True,
    max_examples=40,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("minirlhf")

# Sums depend on the number of threads in their last bits, and small tensors are fastest on one.
if "OMP_NUM_THREADS" not in os.environ:
    torch.set_num_threads(1)
