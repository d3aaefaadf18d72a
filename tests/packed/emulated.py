"""What stands for a card in tests: the emulator's library, and what it read."""

import ctypes

from optimum_dsa.packed import cuda


def emulated(library, **changes):
    """A card of two multiprocessors, which may have 3 blocks of few kilobytes."""
    settings = {"multiprocessors": 2, "shared": (3 * 60000, 58000), "early": False}
    return cuda.Kernels(library, **settings | changes)


class Counted:
    """How often a byte of the weights is read within, while none beyond them may be."""

    def __init__(self, library, weights):
        self.check, self.weights = ctypes.CDLL(str(library)).optimum_dsa_emulated, weights
        self.check.argtypes, self.check.restype = [ctypes.c_void_p] * 2, ctypes.c_long

    def __enter__(self):
        self.check(self.weights.data_ptr(), self.weights.data_ptr() + self.weights.nbytes)
        return self

    def __exit__(self, *error):
        self.times = self.check(None, None) / self.weights.nbytes
