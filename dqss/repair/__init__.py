"""What makes a strategy better without another choice: learned rounding and steps, corrected biases."""

from dqss.repair.network import NetworkErrors
from dqss.repair.reconstruct import UnitErrors
from dqss.repair.repair import Repaired, check_samples, repair_strategy
from dqss.repair.settings import RepairSettings

__all__ = ["NetworkErrors", "RepairSettings", "Repaired", "UnitErrors", "check_samples", "repair_strategy"]
