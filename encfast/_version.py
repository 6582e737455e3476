"""The version, where both the build and encfast._load can read it without the package."""

__version__ = "0.1.0"
