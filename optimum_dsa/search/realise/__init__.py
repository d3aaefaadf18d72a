"""What an allocation is while it is searched for: masks of the model, and later solved levels and widths."""

from .masks import Masks
from .realisation import REALISATIONS, Realisation, check_searchable, realise


__all__ = ["REALISATIONS", "Masks", "Realisation", "check_searchable", "realise"]
