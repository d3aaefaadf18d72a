// Loading this library registers its kernels: in a namespace of its own, and as those of optimum_dsa on a CPU.
#include "torch_binding.h"

#include <torch/csrc/stable/library.h>

// kernel-builder brings this file, and with it a namespace that is unique to a build; other builds only name it.
#if __has_include("registration.h")
#include "registration.h"
#else
#define STABLE_TORCH_LIBRARY_EXPAND(NAME, LIBRARY) STABLE_TORCH_LIBRARY(NAME, LIBRARY)
#define STABLE_TORCH_LIBRARY_IMPL_EXPAND(NAME, KEY, LIBRARY) STABLE_TORCH_LIBRARY_IMPL(NAME, KEY, LIBRARY)
#endif

STABLE_TORCH_LIBRARY_EXPAND(TORCH_EXTENSION_NAME, library) {
  library.def("linear(Tensor input, Tensor mask, Tensor values, Tensor starts, Tensor? scales, int group) -> Tensor");
  library.def(
      "dense_rows(Tensor mask, Tensor values, Tensor starts, Tensor? scales, int group, int columns, int first, "
      "int last, ScalarType dtype) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL_EXPAND(TORCH_EXTENSION_NAME, CPU, library) {
  library.impl("linear", TORCH_BOX(&linear));
  library.impl("dense_rows", TORCH_BOX(&dense_rows));
}

STABLE_TORCH_LIBRARY_IMPL(optimum_dsa, CPU, library) {
  library.impl("linear", TORCH_BOX(&linear));
  library.impl("dense_rows", TORCH_BOX(&dense_rows));
}
