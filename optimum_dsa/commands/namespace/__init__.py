"""`optimum.dsa`: this package where people look for an Optimum plugin, with the names of `optimum_dsa`."""

import optimum_dsa as _package


__all__ = _package.__all__
__version__ = _package.__version__


def __getattr__(name: str):
    try:
        return getattr(_package, name)
    except AttributeError:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
