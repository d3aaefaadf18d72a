// AVX-512: weights of 8 and 4 bits times inputs of 16, whole numbers both, summed exactly within a block.
#include "packed.h"

#if defined(__x86_64__)
#include "avx512.h"

namespace packed {
namespace {

// R rows share the loads of N inputs. A block of 256 columns sums up at most 16 * 128 * 32767 in 32 bits, below 2^31.
// HALVES: blocks of 32, so that each half of 64 columns has scales of its own.
template <Type T, int N, int R, int BLOCK, bool WHOLE>
INLINE void rows_of(const Matrix& m, const Inputs& inputs, const Output& out, int64_t r) {
  constexpr bool HALVES = BLOCK == 32;
  constexpr int SUMS = HALVES || N * R <= 4 ? 2 : 1;
  constexpr float UNIT = T == Type::int4 ? 1.f / 16 : 1;
  constexpr int64_t width = HALVES ? 64 : BLOCK;
  const int64_t bytes = m.columns / 8;
  const uint8_t* mask = m.mask + r * bytes;
  const int16_t* x = inputs.row<int16_t>(0);
  const float* scales = m.scales + r * m.groups;
  int64_t place[R], group = 0, until = m.group, block = 0;
  __m512 total[R][N];
  for (int i = 0; i < R; i++) {
    place[i] = m.starts[r + i];
    for (int b = 0; b < N; b++) total[i][b] = _mm512_setzero_ps();
  }
  for (int64_t c = 0; c < m.columns; c += width, block += HALVES ? 2 : 1) {
    __m512i sum[R][N][SUMS];
    for (int i = 0; i < R; i++)
      for (int b = 0; b < N; b++)
        for (int s = 0; s < SUMS; s++) sum[i][b][s] = _mm512_setzero_si512();
#pragma GCC unroll 4
    for (int64_t d = c; d < c + width; d += 64) {
      if (d >= m.columns) break;
#pragma GCC unroll 2
      for (int i = 0; i < R; i++) {
        const uint8_t* at = mask + i * bytes + d / 8;
        _mm_prefetch((const char*)m.values + place[i] * BITS<T> / 8 + AHEAD, _MM_HINT_T0);
        _mm_prefetch((const char*)at + AHEAD_MASK, _MM_HINT_T0);
        const uint64_t keep = m.columns - d >= 64 ? load64(at) : load_bytes(at, (m.columns - d) / 8);
        const int count = _mm_popcnt_u64(keep);
        const __m512i w = spread_bytes(keep, some_numbers<T, WHOLE>(m.values, place[i], count));
        place[i] += count;
        const __m512i low = _mm512_cvtepi8_epi16(_mm512_castsi512_si256(w));
        const __m512i high = _mm512_cvtepi8_epi16(_mm512_extracti64x4_epi64(w, 1));
#pragma GCC unroll 8
        for (int b = 0; b < N; b++) {
          const int16_t* xb = x + b * inputs.stride + d;
          __m512i &one = sum[i][b][0], &other = sum[i][b][SUMS - 1];
          one = _mm512_dpwssd_epi32(one, low, _mm512_loadu_si512(xb));
          other = _mm512_dpwssd_epi32(other, high, _mm512_loadu_si512(xb + 32));
        }
      }
    }
    while (c >= until) group++, until += m.group;
    const bool second = HALVES && c + 32 < m.columns;  // a block of its own, and maybe of the next group
    const int64_t next = second && c + 32 >= until ? group + 1 : group;
    for (int i = 0; i < R; i++)
      for (int b = 0; b < N; b++) {
        const float* xs = inputs.scales.data() + b * inputs.blocks + block;
        const float* ws = scales + i * m.groups;
        __m512i first = sum[i][b][0];
        if (SUMS == 2 && !HALVES) first = _mm512_add_epi32(first, sum[i][b][1]);
        total[i][b] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(first), _mm512_set1_ps(xs[0] * ws[group]), total[i][b]);
        if (second)
          total[i][b] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[i][b][SUMS - 1]), _mm512_set1_ps(xs[1] * ws[next]),
                                        total[i][b]);
      }
  }
  for (int i = 0; i < R; i++)
    for (int b = 0; b < N; b++) out.set(b, r + i, UNIT * _mm512_reduce_add_ps(total[i][b]));
}

template <Type T, int N, int BLOCK>
TARGET void all_rows(const Matrix& m, const Inputs& inputs, const Output& out, int64_t first, int64_t last) {
  constexpr int R = N <= 2 ? 1 : 2;  // one row at a time reads memory in order
  int64_t r = first;
  for (; r + R <= last && m.starts[r + R] + OVER <= m.kept(); r += R)
    rows_of<T, N, R, BLOCK, true>(m, inputs, out, r);
  for (; r < last; r++) rows_of<T, N, 1, BLOCK, false>(m, inputs, out, r);
}

#define ALL_ROWS(N, T, BLOCK) all_rows<T, N, BLOCK>(m, inputs, out, first, last)
template <Type T> void lanes_of(const Matrix& m, const Inputs& inputs, const Output& out, int64_t first, int64_t last) {
  if (inputs.block == 32) EACH_LANES(ALL_ROWS, T, 32)
  if (inputs.block == 64) EACH_LANES(ALL_ROWS, T, 64)
  if (inputs.block == 128) EACH_LANES(ALL_ROWS, T, 128)
  EACH_LANES(ALL_ROWS, T, 256)
}

}  // namespace

void whole_product(const Matrix& m, const Inputs& inputs, const Output& out, int64_t first, int64_t last) {
  if (m.type == Type::int8) lanes_of<Type::int8>(m, inputs, out, first, last);
  else lanes_of<Type::int4>(m, inputs, out, first, last);
}

}  // namespace packed
#endif
