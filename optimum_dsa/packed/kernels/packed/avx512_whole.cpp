// AVX-512: weights of 8 and 4 bits times inputs of 16, whole numbers both, summed exactly within a block.
#include "packed.h"

#if defined(__x86_64__)
#include "avx512.h"

namespace packed {
namespace {

// Adds 64 weights times N inputs to sums of 32 bits. A block of 128 columns adds at most 4 * 2 * 128 * 32767 < 2^31.
template <Type T, int N, bool WHOLE>
INLINE void step(const Matrix& m, const int16_t* x, int64_t stride, uint64_t keep, int64_t place, __m512i (&sum)[N][2]) {
  const __m512i w = spread_bytes(keep, some_numbers<T, WHOLE>(m.values, place, _mm_popcnt_u64(keep)));
  const __m512i low = _mm512_cvtepi8_epi16(_mm512_castsi512_si256(w));
  const __m512i high = _mm512_cvtepi8_epi16(_mm512_extracti64x4_epi64(w, 1));
#pragma GCC unroll 8
  for (int b = 0; b < N; b++) {
    sum[b][0] = _mm512_dpwssd_epi32(sum[b][0], low, _mm512_loadu_si512(x + b * stride));
    sum[b][1] = _mm512_dpwssd_epi32(sum[b][1], high, _mm512_loadu_si512(x + b * stride + 32));
  }
}

// BLOCK 32: each half of 64 columns has scales of its own.
template <Type T, int N, int BLOCK, bool WHOLE>
INLINE void row_of(const Matrix& m, const Inputs& inputs, const Output& out, int64_t r) {
  constexpr int64_t WIDTH = BLOCK == 32 ? 64 : BLOCK;
  const uint8_t* mask = m.mask + r * (m.columns / 8);
  const int16_t* x = inputs.row<int16_t>(0);
  const float* scales = m.scales + r * m.groups;
  int64_t place = m.starts[r], group = 0, until = m.group, block = 0;
  __m512 total[N];
  for (int b = 0; b < N; b++) total[b] = _mm512_setzero_ps();
  for (int64_t c = 0; c < m.columns; c += WIDTH, block += WIDTH / BLOCK) {
    __m512i sum[N][2];
    for (int b = 0; b < N; b++) sum[b][0] = sum[b][1] = _mm512_setzero_si512();
    _mm_prefetch((const char*)m.values + place * BITS<T> / 8 + AHEAD, _MM_HINT_T0);
    if (BLOCK == 128) _mm_prefetch((const char*)m.values + place * BITS<T> / 8 + AHEAD + 64, _MM_HINT_T0);
    _mm_prefetch((const char*)mask + c / 8 + AHEAD_MASK, _MM_HINT_T0);
#pragma GCC unroll 2
    for (int64_t i = 0; i < WIDTH; i += 64) {
      const int64_t left = m.columns - c - i;
      if (left <= 0) break;
      const uint64_t keep = left >= 64 ? load64(mask + (c + i) / 8) : load_bytes(mask + (c + i) / 8, left / 8);
      step<T, N, WHOLE>(m, x + c + i, inputs.stride, keep, place, sum);
      place += _mm_popcnt_u64(keep);
    }
    while (c >= until) group++, until += m.group;
    if (BLOCK == 32) {
      const int64_t next = c + 32 < m.columns && c + 32 >= until ? group + 1 : group;
      const bool second = block + 1 < inputs.blocks;
      for (int b = 0; b < N; b++) {
        const float* xs = inputs.scales.data() + b * inputs.blocks + block;
        total[b] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[b][0]), _mm512_set1_ps(xs[0] * scales[group]), total[b]);
        if (second)
          total[b] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[b][1]), _mm512_set1_ps(xs[1] * scales[next]), total[b]);
      }
    } else {
      for (int b = 0; b < N; b++) {
        const __m512i both = _mm512_add_epi32(sum[b][0], sum[b][1]);
        const float scale = inputs.scales[b * inputs.blocks + block] * scales[group];
        total[b] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(both), _mm512_set1_ps(scale), total[b]);
      }
    }
  }
  for (int b = 0; b < N; b++) out.set(b, r, _mm512_reduce_add_ps(total[b]));
}

template <Type T, int N, int BLOCK>
TARGET void rows_of(const Matrix& m, const Inputs& inputs, const Output& out, int64_t first, int64_t last) {
  for (int64_t r = first; r < last; r++)
    if (m.starts[r + 1] + OVER <= m.kept()) row_of<T, N, BLOCK, true>(m, inputs, out, r);
    else row_of<T, N, BLOCK, false>(m, inputs, out, r);
}

#define ROWS(N, T, BLOCK) rows_of<T, N, BLOCK>(m, inputs, out, first, last)
template <Type T> void blocks_of(const Matrix& m, const Inputs& inputs, const Output& out, int64_t first, int64_t last) {
  if (inputs.block == 128) EACH_LANES(ROWS, T, 128)
  if (inputs.block == 64) EACH_LANES(ROWS, T, 64)
  EACH_LANES(ROWS, T, 32)
}

}  // namespace

void whole_product(const Matrix& m, const Inputs& inputs, const Output& out, int64_t first, int64_t last) {
  if (m.type == Type::int8) blocks_of<Type::int8>(m, inputs, out, first, last);
  else blocks_of<Type::int4>(m, inputs, out, first, last);
}

}  // namespace packed
#endif
