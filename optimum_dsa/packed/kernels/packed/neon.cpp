// NEON: eight weights at a time, spread by a table of bytes, in float32. float32 values: the plain kernel.
#include "packed.h"

#if defined(__aarch64__)
#include <arm_neon.h>

#define INLINE static __attribute__((always_inline)) inline

namespace packed {
namespace {

constexpr int64_t OVER = 16;  // values behind a row that a whole load may touch

struct Two {
  float32x4_t low, high;
};

template <Type T, bool WHOLE> INLINE uint8x16_t some(const void* values, int64_t place, int count) {
  constexpr int size = T == Type::int8 ? 1 : 2;
  const uint8_t* from = static_cast<const uint8_t*>(values) + place * size;
  if (WHOLE) return size == 1 ? vcombine_u8(vld1_u8(from), vdup_n_u8(0)) : vld1q_u8(from);
  uint8_t copy[16] = {0};
  std::memcpy(copy, from, count * size);
  return vld1q_u8(copy);
}

template <bool WHOLE> INLINE uint8x16_t some_int4(const void* values, int64_t place, int count) {
  const uint8_t* from = static_cast<const uint8_t*>(values) + place / 2;
  const int odd = place % 2;
  const uint64_t both = (WHOLE ? load64(from) : load_bytes(from, (count + odd + 1) / 2)) >> (4 * odd);
  const uint8x8_t two = vcreate_u8(both), fifteen = vdup_n_u8(15), eight = vdup_n_u8(8);
  const uint8x8_t numbers = vzip1_u8(vand_u8(two, fifteen), vshr_n_u8(two, 4));
  return vcombine_u8(vsub_u8(veor_u8(numbers, eight), eight), vdup_n_u8(0));  // extends the sign
}

template <Type T, bool WHOLE> INLINE Two take(const void* values, int64_t place, uint32_t keep, int count) {
  if constexpr (T == Type::int8 || T == Type::int4) {
    uint8x16_t numbers;
    if constexpr (T == Type::int4) numbers = some_int4<WHOLE>(values, place, count);
    else numbers = some<T, WHOLE>(values, place, count);
    const uint8x8_t spread = vqtbl1_u8(numbers, vld1_u8(TABLES.bytes[keep]));
    const int16x8_t wide = vmovl_s8(vreinterpret_s8_u8(spread));
    return {vcvtq_f32_s32(vmovl_s16(vget_low_s16(wide))), vcvtq_f32_s32(vmovl_s16(vget_high_s16(wide)))};
  } else {
    const uint16x8_t spread =
        vreinterpretq_u16_u8(vqtbl1q_u8(some<T, WHOLE>(values, place, count), vld1q_u8(TABLES.halves[keep])));
    if constexpr (T == Type::float16)
      return {vcvt_f32_f16(vreinterpret_f16_u16(vget_low_u16(spread))),
              vcvt_f32_f16(vreinterpret_f16_u16(vget_high_u16(spread)))};
    return {vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(spread), 16)),
            vreinterpretq_f32_u32(vshll_n_u16(vget_high_u16(spread), 16))};
  }
}

template <Type T, int N, bool WHOLE> INLINE void row_of(const Matrix& m, const Inputs& inputs, const Output& out, int64_t r) {
  const uint8_t* mask = m.mask + r * (m.columns / 8);
  const float* x = inputs.row<float>(0);
  int64_t place = m.starts[r];
  float32x4_t total[N];
  for (int b = 0; b < N; b++) total[b] = vdupq_n_f32(0);
  for (int64_t g = 0; g < m.groups; g++) {
    const int64_t end = g + 1 < m.groups ? (g + 1) * m.group : m.columns;
    float32x4_t low[N], high[N];
    for (int b = 0; b < N; b++) low[b] = high[b] = vdupq_n_f32(0);
    for (int64_t c = g * m.group; c < end; c += 8) {
      const uint32_t byte = mask[c / 8];
      const int count = __builtin_popcount(byte);
      const Two w = take<T, WHOLE>(m.values, place, byte, count);
      place += count;
      for (int b = 0; b < N; b++) {
        const float* xb = x + b * inputs.stride + c;
        low[b] = vfmaq_f32(low[b], w.low, vld1q_f32(xb));
        high[b] = vfmaq_f32(high[b], w.high, vld1q_f32(xb + 4));
      }
    }
    const float scale = m.scales ? m.scales[r * m.groups + g] : 1;
    for (int b = 0; b < N; b++) total[b] = vfmaq_n_f32(total[b], vaddq_f32(low[b], high[b]), scale);
  }
  for (int b = 0; b < N; b++) out.set(b, r, vaddvq_f32(total[b]));
}

template <Type T, int N> void rows_of(const Matrix& m, const Inputs& inputs, const Output& out, int64_t first, int64_t last) {
  for (int64_t r = first; r < last; r++)
    if (m.starts[r + 1] + OVER <= m.kept()) row_of<T, N, true>(m, inputs, out, r);
    else row_of<T, N, false>(m, inputs, out, r);
}

template <Type T> void lanes_of(const Matrix& m, const Inputs& inputs, const Output& out, int64_t first, int64_t last) {
  if (inputs.lanes == 1) return rows_of<T, 1>(m, inputs, out, first, last);
  return inputs.lanes == 2 ? rows_of<T, 2>(m, inputs, out, first, last) : rows_of<T, 4>(m, inputs, out, first, last);
}

void product(const Matrix& m, const Inputs& inputs, const Output& out, int64_t first, int64_t last) {
  switch (m.type) {
    case Type::bfloat16: return lanes_of<Type::bfloat16>(m, inputs, out, first, last);
    case Type::float16: return lanes_of<Type::float16>(m, inputs, out, first, last);
    case Type::float32: return scalar.product(m, inputs, out, first, last);
    case Type::int8: return lanes_of<Type::int8>(m, inputs, out, first, last);
    case Type::int4: return lanes_of<Type::int4>(m, inputs, out, first, last);
  }
}

template <Type T, bool WHOLE> INLINE void unpack_row(const Matrix& m, const Output& out, int64_t base, int64_t r) {
  const uint8_t* mask = m.mask + r * (m.columns / 8);
  int64_t place = m.starts[r];
  for (int64_t c = 0; c < m.columns; c += 8) {
    const uint32_t byte = mask[c / 8];
    const int count = __builtin_popcount(byte);
    const float scale = m.scales ? m.scales[r * m.groups + c / m.group] : 1;
    if (m.type == out.type) {  // bit for bit
      const uint8x16_t spread = vqtbl1q_u8(some<T, WHOLE>(m.values, place, count), vld1q_u8(TABLES.halves[byte]));
      vst1q_u8(static_cast<uint8_t*>(out.data) + 2 * ((r - base) * m.columns + c), spread);
    } else {
      const Two w = take<T, WHOLE>(m.values, place, byte, count);
      float weights[8];
      vst1q_f32(weights, vmulq_n_f32(w.low, scale));
      vst1q_f32(weights + 4, vmulq_n_f32(w.high, scale));
      for (int i = 0; i < 8; i++) out.set(r - base, c + i, weights[i]);
    }
    place += count;
  }
}

template <Type T> void unpack_of(const Matrix& m, const Output& out, int64_t first, int64_t last) {
  for (int64_t r = first; r < last; r++)
    if (m.starts[r + 1] + OVER <= m.kept()) unpack_row<T, true>(m, out, first, r);
    else unpack_row<T, false>(m, out, first, r);
}

void unpack(const Matrix& m, void* data, Type type, int64_t first, int64_t last) {
  const Output out{data, type, last - first, m.columns};
  switch (m.type) {
    case Type::bfloat16: return unpack_of<Type::bfloat16>(m, out, first, last);
    case Type::float16: return unpack_of<Type::float16>(m, out, first, last);
    case Type::float32: return scalar.unpack(m, data, type, first, last);
    case Type::int8: return unpack_of<Type::int8>(m, out, first, last);
    case Type::int4: return unpack_of<Type::int4>(m, out, first, last);
  }
}

}  // namespace

const Kernels neon = {"neon", [] { return true; }, [](const Matrix&, Type) { return Layout::floats; }, product, unpack,
                      [](const Matrix& m) -> int64_t { return m.type == Type::float32 ? 1 : 4; }};

}  // namespace packed
#endif
