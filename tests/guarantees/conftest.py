"""Campaigns: a few generated cases in an ordinary run, all of them with --slow, counted as in tests/reliability."""

from tests.reliability.conftest import promise

__all__ = ["promise"]
