// Plain C++: any processor.
#include "packed.h"

namespace packed {
namespace {

template <Type T> float value_at(const void* values, int64_t place) {
  if constexpr (T == Type::bfloat16) return from_bfloat16(static_cast<const uint16_t*>(values)[place]);
  else if constexpr (T == Type::float16) return from_float16(static_cast<const uint16_t*>(values)[place]);
  else if constexpr (T == Type::float32) return static_cast<const float*>(values)[place];
  else if constexpr (T == Type::int8) return static_cast<const int8_t*>(values)[place];
  else return from_int4(static_cast<const uint8_t*>(values)[place / 2] >> (place % 2 * 4));
}

template <Type T> void rows_of(const Matrix& m, const Inputs& inputs, const Output& out, int64_t first, int64_t last) {
  const float* x = inputs.row<float>(0);
  for (int64_t r = first; r < last; r++) {
    const uint8_t* mask = m.mask + r * (m.columns / 8);
    int64_t place = m.starts[r];
    float total[8] = {0};
    for (int64_t g = 0; g < m.groups; g++) {
      const int64_t begin = g * m.group, end = begin + m.group < m.columns ? begin + m.group : m.columns;
      float sum[8] = {0};
      for (int64_t c = begin; c < end; c += 8)
        for (uint32_t keep = mask[c / 8]; keep; keep &= keep - 1) {
          const float w = value_at<T>(m.values, place++);
          const float* column = x + c + __builtin_ctz(keep);
          for (int64_t b = 0; b < inputs.lanes; b++) sum[b] += w * column[b * inputs.stride];
        }
      const float scale = m.scales ? m.scales[r * m.groups + g] : 1;
      for (int64_t b = 0; b < inputs.lanes; b++) total[b] += scale * sum[b];
    }
    for (int64_t b = 0; b < inputs.lanes; b++) out.set(b, r, total[b]);
  }
}

template <Type T> void unpack_of(const Matrix& m, const Output& out, int64_t first, int64_t last) {
  for (int64_t r = first; r < last; r++) {
    const uint8_t* mask = m.mask + r * (m.columns / 8);
    int64_t place = m.starts[r];
    for (int64_t c = 0; c < m.columns; c += 8) {
      const float scale = m.scales ? m.scales[r * m.groups + c / m.group] : 1;
      for (int i = 0; i < 8; i++)
        out.set(r - first, c + i, mask[c / 8] >> i & 1 ? scale * value_at<T>(m.values, place++) : 0);
    }
  }
}

void product(const Matrix& m, const Inputs& inputs, const Output& out, int64_t first, int64_t last) {
  switch (m.type) {
    case Type::bfloat16: return rows_of<Type::bfloat16>(m, inputs, out, first, last);
    case Type::float16: return rows_of<Type::float16>(m, inputs, out, first, last);
    case Type::float32: return rows_of<Type::float32>(m, inputs, out, first, last);
    case Type::int8: return rows_of<Type::int8>(m, inputs, out, first, last);
    case Type::int4: return rows_of<Type::int4>(m, inputs, out, first, last);
  }
}

// Bits as they are: a NaN keeps its payload.
template <class T> void copy_of(const Matrix& m, T* out, int64_t first, int64_t last) {
  const T* v = static_cast<const T*>(m.values) + m.starts[first];
  std::memset(out, 0, (last - first) * m.columns * sizeof(T));
  const uint8_t* mask = m.mask + first * (m.columns / 8);
  for (int64_t i = 0; i < (last - first) * m.columns; i += 8, mask++)
    for (uint32_t keep = *mask; keep; keep &= keep - 1) out[i + __builtin_ctz(keep)] = *v++;
}

void unpack(const Matrix& m, void* data, Type type, int64_t first, int64_t last) {
  if (m.type == type && type == Type::float32) return copy_of(m, static_cast<uint32_t*>(data), first, last);
  if (m.type == type) return copy_of(m, static_cast<uint16_t*>(data), first, last);
  const Output out{data, type, last - first, m.columns};
  switch (m.type) {
    case Type::bfloat16: return unpack_of<Type::bfloat16>(m, out, first, last);
    case Type::float16: return unpack_of<Type::float16>(m, out, first, last);
    case Type::float32: return unpack_of<Type::float32>(m, out, first, last);
    case Type::int8: return unpack_of<Type::int8>(m, out, first, last);
    case Type::int4: return unpack_of<Type::int4>(m, out, first, last);
  }
}

}  // namespace

const Kernels scalar = {
    "scalar", [] { return true; }, [](const Matrix&, Type) { return Layout::floats; }, product, unpack,
    [](const Matrix&) -> int64_t { return 1; }};

}  // namespace packed
