"""``python -m dqss.schema`` prints the JSON Schema of ``strategy.json``."""

from __future__ import annotations

import json
from typing import Any

from dqss.strategy import Strategy


def json_schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) that every strategy file satisfies."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Strategy.model_json_schema()}


def main() -> None:
    """Print the schema."""
    print(json.dumps(json_schema(), indent=2))


if __name__ == "__main__":
    main()
