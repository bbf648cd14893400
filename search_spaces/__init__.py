"""Search spaces: functions that return a :class:`dqss.space.SearchSpace`.

Installed as ``dqss.search_spaces``. A new one is a function here (or in your own package) and a
file in ``conf/search_space``.
"""

from dqss.search_spaces.learned import learned
from dqss.search_spaces.studies import eight
from dqss.search_spaces.uniform import uniform

__all__ = ["eight", "learned", "uniform"]
