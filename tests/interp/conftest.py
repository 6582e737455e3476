"""Triton's interpreter runs the kernels on CPU tensors, in a process of its own (`make test`)."""

import os

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]
