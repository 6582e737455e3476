"""The tests of a library share its models; pytest's importlib mode leaves the path to us."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
