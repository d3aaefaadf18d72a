"""What an allocation is while it is searched for: masks of the model, matrices solved at levels, and later widths."""

from .database import Database
from .masks import Masks
from .realisation import REALISATIONS, Realisation, check_searchable, realise, suited


__all__ = ["REALISATIONS", "Database", "Masks", "Realisation", "check_searchable", "realise", "suited"]
