"""What an assignment may cost: costs, limits on them, and the best assignment within the limits."""

from __future__ import annotations

from dqss.budget.limits import Budget, Limits

__all__ = ["Budget", "Limits"]
