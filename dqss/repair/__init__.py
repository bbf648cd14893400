"""What makes a strategy better without another choice: learned rounding and steps, corrected biases."""

from dqss.repair.network import NetworkErrors
from dqss.repair.reconstruct import UnitErrors
from dqss.repair.repair import Repaired, repair_strategy
from dqss.repair.settings import RepairSettings

__all__ = ["NetworkErrors", "RepairSettings", "Repaired", "UnitErrors", "repair_strategy"]
