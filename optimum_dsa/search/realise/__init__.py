"""What an allocation is while it is searched for: masks of the model, matrices solved at levels, and later widths."""

from .database import Database
from .masks import Masks
from .metric_masks import MetricMasks
from .realisation import REALISATIONS, Realisation, check_searchable, realise, suited


__all__ = ["REALISATIONS", "Database", "Masks", "MetricMasks", "Realisation", "check_searchable", "realise", "suited"]
