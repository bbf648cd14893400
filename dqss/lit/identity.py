"""What the contents of a run folder depend on, so that nothing is mixed up by going on there."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from dataclasses import dataclass
from typing import Any

from dqss.errors import OutputError
from dqss.io import Journal
from dqss.lit.settings import PTQSettings
from dqss.losses import Distance
from dqss.prepare import Prepared
from dqss.samples import Samples, inputs_sha256
from dqss.supernet import Supernet

JOURNAL = "measured.jsonl"
"""Its presence says that something was measured in the folder."""
_KEY = "identity"


@dataclass(frozen=True)
class SearchIdentity:
    """Two searches with the same parts measure and decide the same."""

    parts: dict[str, str]

    def check(self, journal: Journal) -> None:
        """Write the identity into a new journal; compare it with that in an old one.

        Raises:
            OutputError: naming what differs.
        """
        known = journal.get(_KEY)
        if known is None:
            journal.put(_KEY, self.parts)
            return
        differ = [name for name, value in self.parts.items() if known.get(name) != value]
        if differ:
            folder = None if journal.path is None else journal.path.parent
            raise OutputError(
                f"{folder} holds a search with other {', '.join(differ)}: choose another output folder"
            )


def search_identity(
    prepared: Prepared,
    samples: Samples,
    supernet: Supernet,
    settings: PTQSettings,
    distance: Distance,
    seed: int,
) -> SearchIdentity:
    """Of one search; what only says how long it may take or what it reports is left out."""
    words = settings_words(
        settings,
        max_minutes=None,
        checkpoint_every=1,
        oracle=False,
        recompute=None,
        repair=None,
        search_again=False,
    )
    return SearchIdentity(
        {
            "weights": prepared.weights_sha256,
            "inputs": inputs_sha256(samples),
            "seed": str(seed),
            "settings": f"{words} {distance.name}",
            "search space": options_sha256(supernet),
        }
    )


def settings_words(settings: Any, **free: Any) -> str:
    """All fields of a settings dataclass in words, but for those that do not matter: ``free``."""
    # A default repr ends in the object's address.
    return re.sub(r" at 0x[0-9a-f]+", "", repr(dataclasses.replace(settings, **free)))


def options_sha256(supernet: Supernet) -> str:
    """Sha256 of all decisions with their options."""
    options = [(name, decision.options) for name, decision in supernet.decisions.items()]
    return hashlib.sha256(repr(options).encode()).hexdigest()
