"""dqss: differentiable search for optimal quantization strategies, layer by layer.

Nothing heavy is imported until it is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_EXPORTS = {
    "Budget": "dqss.budget",
    "PTQSettings": "dqss.lit.settings",
    "QATSettings": "dqss.lit.qat_settings",
    "RepairSettings": "dqss.repair",
    "Samples": "dqss.samples",
    "SearchSpace": "dqss.space",
    "UserError": "dqss.errors",
    "apply_strategy": "dqss.apply",
    "export_model": "dqss.deploy.export",
    "export_program": "dqss.deploy.program",
    "load": "dqss.bundle",
    "repair_strategy": "dqss.repair",
    "search_ptq": "dqss.lit.search",
    "search_qat": "dqss.lit.qat_search",
}
_SUBMODULES = ("data", "models", "search_spaces")

if TYPE_CHECKING:
    from dqss.apply import apply_strategy
    from dqss.budget import Budget
    from dqss.bundle import load
    from dqss.deploy.export import export_model
    from dqss.deploy.program import export_program
    from dqss.errors import UserError
    from dqss.lit.qat_search import search_qat
    from dqss.lit.qat_settings import QATSettings
    from dqss.lit.search import search_ptq
    from dqss.lit.settings import PTQSettings
    from dqss.repair import RepairSettings, repair_strategy
    from dqss.samples import Samples
    from dqss.space import SearchSpace

__all__ = [
    "Budget",
    "PTQSettings",
    "QATSettings",
    "RepairSettings",
    "Samples",
    "SearchSpace",
    "UserError",
    "__version__",
    "apply_strategy",
    "export_model",
    "export_program",
    "load",
    "repair_strategy",
    "search_ptq",
    "search_qat",
]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name]), name)
    if name in _SUBMODULES:
        return importlib.import_module(f"dqss.{name}")
    raise AttributeError(f"module 'dqss' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_EXPORTS, *_SUBMODULES])
