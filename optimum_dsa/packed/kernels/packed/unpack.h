// Which rows unpack which type, for instruction sets that spread values in registers.
#pragma once
#include "packed.h"

namespace packed {

// `Rows<T, SAME>::rows` unpacks values of type T, with SAME bit for bit into their own type. It is compiled for its
// processor where it stands; what is here runs on any.
template <template <Type, bool> class Rows>
void unpack_by(const Matrix& m, void* out, Type type, int64_t first, int64_t last) {
  const bool same = m.type == type;
  switch (m.type) {
    case Type::bfloat16:
      return same ? Rows<Type::bfloat16, true>::rows(m, out, type, first, last)
                  : Rows<Type::bfloat16, false>::rows(m, out, type, first, last);
    case Type::float16:
      return same ? Rows<Type::float16, true>::rows(m, out, type, first, last)
                  : Rows<Type::float16, false>::rows(m, out, type, first, last);
    case Type::float32:
      return same ? Rows<Type::float32, true>::rows(m, out, type, first, last)
                  : Rows<Type::float32, false>::rows(m, out, type, first, last);
    case Type::int8: return Rows<Type::int8, false>::rows(m, out, type, first, last);
    case Type::int4: return Rows<Type::int4, false>::rows(m, out, type, first, last);
  }
}

}  // namespace packed
