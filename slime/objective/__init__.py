"""What the trainer minimises: streams with coefficients and denominators of their own, and what they look
like."""

from slime.objective.objective import Objective
from slime.objective.streams import Distillation

__all__ = ["Distillation", "Objective"]
