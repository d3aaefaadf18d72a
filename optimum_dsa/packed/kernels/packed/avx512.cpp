// AVX-512 with VBMI2: 32 or 64 weights at a time, spread by their mask in a register; with BF16, two products a step.
#include "unpack.h"

#if defined(__x86_64__)
#include "avx512.h"

#define TARGET_BF16 TARGET __attribute__((target("avx512bf16")))
#define INLINE_BF16 static TARGET_BF16 __attribute__((always_inline)) inline

namespace packed {
namespace {

INLINE float sum_of(const __m512* sums, int count) {
  __m512 sum = sums[0];
  for (int s = 1; s < count; s++) sum = _mm512_add_ps(sum, sums[s]);
  return _mm512_reduce_add_ps(sum);
}

// R rows share the loads of N inputs, one row reads memory in order. WHOLE: see `some_halves`.
template <int N, int R, bool WHOLE>
INLINE_BF16 void rows_bf16(const Matrix& m, const Inputs& inputs, const Output& out, int64_t r) {
  constexpr int SUMS = N == 1 ? 4 : N == 2 ? 2 : 1;  // that do not wait for each other
  const int64_t columns = m.columns, bytes = columns / 8;
  const uint8_t* mask = m.mask + r * bytes;
  const uint16_t* x = inputs.row<uint16_t>(0);
  const uint16_t* v[R];
  __m512 sum[R][N][SUMS];
  for (int i = 0; i < R; i++) {
    v[i] = static_cast<const uint16_t*>(m.values) + m.starts[r + i];
    for (int b = 0; b < N; b++)
      for (int s = 0; s < SUMS; s++) sum[i][b][s] = _mm512_setzero_ps();
  }
  int64_t c = 0;
  for (; WHOLE && c + 128 <= columns; c += 128, mask += 16) {
#pragma GCC unroll 2
    for (int i = 0; i < R; i++) {
      _mm_prefetch((const char*)v[i] + AHEAD, _MM_HINT_T0);
      _mm_prefetch((const char*)v[i] + AHEAD + 64, _MM_HINT_T0);
      _mm_prefetch((const char*)mask + i * bytes + AHEAD_MASK, _MM_HINT_T0);
    }
#pragma GCC unroll 2
    for (int g = 0; g < 2; g++) {
#pragma GCC unroll 2
      for (int i = 0; i < R; i++) {
        const uint64_t keep = load64(mask + i * bytes + 8 * g);
        const uint16_t* second = v[i] + _mm_popcnt_u32((uint32_t)keep);
        const __m512bh low = (__m512bh)spread_halves((uint32_t)keep, _mm512_loadu_si512(v[i]));
        const __m512bh high = (__m512bh)spread_halves(keep >> 32, _mm512_loadu_si512(second));
        v[i] += _mm_popcnt_u64(keep);
#pragma GCC unroll 8
        for (int b = 0; b < N; b++) {
          const uint16_t* xb = x + b * inputs.stride + c + 64 * g;
          __m512 &one = sum[i][b][2 * g % SUMS], &other = sum[i][b][(2 * g + 1) % SUMS];
          one = _mm512_dpbf16_ps(one, low, (__m512bh)_mm512_loadu_si512(xb));
          other = _mm512_dpbf16_ps(other, high, (__m512bh)_mm512_loadu_si512(xb + 32));
        }
      }
    }
  }
  for (; c < columns; c += 32, mask += 4)
    for (int i = 0; i < R; i++) {
      const uint8_t* at = mask + i * bytes;
      const uint32_t keep = columns - c >= 32 ? load32(at) : (uint32_t)load_bytes(at, (columns - c) / 8);
      const int count = _mm_popcnt_u32(keep);
      const __m512bh w = (__m512bh)spread_halves(keep, some_halves<false>(v[i], count));
      v[i] += count;
      for (int b = 0; b < N; b++)
        sum[i][b][0] = _mm512_dpbf16_ps(sum[i][b][0], w, (__m512bh)_mm512_loadu_si512(x + b * inputs.stride + c));
    }
  for (int i = 0; i < R; i++)
    for (int b = 0; b < N; b++) out.set(b, r + i, sum_of(sum[i][b], SUMS));
}

template <int N>
TARGET_BF16 void all_bf16(const Matrix& m, const Inputs& inputs, const Output& out, int64_t first, int64_t last) {
  constexpr int R = N <= 2 ? 1 : 2;
  int64_t r = first;
  for (; r + R <= last && m.starts[r + R] + OVER <= m.kept(); r += R) rows_bf16<N, R, true>(m, inputs, out, r);
  for (; r < last; r++) rows_bf16<N, 1, false>(m, inputs, out, r);
}

struct Two {
  __m512 low, high;
};

// 32 weights in their order as float32, without their scale.
template <Type T, bool WHOLE> INLINE Two take(const void* values, int64_t place, uint32_t keep) {
  const int count = _mm_popcnt_u32(keep);
  if constexpr (T == Type::float32) {
    const float* v = static_cast<const float*>(values) + place;
    const int half = _mm_popcnt_u32(keep & 0xffff);
    const __mmask16 low = WHOLE ? 0xffff : _bzhi_u32(~0u, half), high = WHOLE ? 0xffff : _bzhi_u32(~0u, count - half);
    return {(__m512)spread_words(keep, _mm512_maskz_loadu_epi32(low, v)),
            (__m512)spread_words(keep >> 16, _mm512_maskz_loadu_epi32(high, v + half))};
  } else if constexpr (T == Type::int8 || T == Type::int4) {
    const __m512i w = spread_bytes(keep, some_numbers<T, WHOLE>(values, place, count));
    const __m256i numbers = _mm512_castsi512_si256(w);
    __m512i low = _mm512_cvtepi8_epi32(_mm256_castsi256_si128(numbers));
    __m512i high = _mm512_cvtepi8_epi32(_mm256_extracti128_si256(numbers, 1));
    if (T == Type::int4) low = _mm512_srai_epi32(low, 4), high = _mm512_srai_epi32(high, 4);
    return {_mm512_cvtepi32_ps(low), _mm512_cvtepi32_ps(high)};
  } else {
    const __m512i w = spread_halves(keep, some_halves<WHOLE>(static_cast<const uint16_t*>(values) + place, count));
    const __m256i low = _mm512_castsi512_si256(w), high = _mm512_extracti64x4_epi64(w, 1);
    if constexpr (T == Type::float16) return {_mm512_cvtph_ps(low), _mm512_cvtph_ps(high)};
    return {(__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(low), 16),
            (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16)};
  }
}

// 32 bfloat16 as the even and the odd ones: a shift and a mask, where their order takes two instructions more.
template <bool WHOLE> INLINE Two take_pairs(const void* values, int64_t place, uint32_t keep) {
  const auto* v = static_cast<const uint16_t*>(values) + place;
  const __m512i w = spread_halves(keep, some_halves<WHOLE>(v, _mm_popcnt_u32(keep)));
  return {(__m512)_mm512_slli_epi32(w, 16), (__m512)_mm512_and_si512(w, _mm512_set1_epi32(0xffff0000))};
}

template <Type T, int N, bool WHOLE>
INLINE void row_floats(const Matrix& m, const Inputs& inputs, const Output& out, int64_t r) {
  constexpr int SUMS = N == 1 ? 4 : 2;
  const uint8_t* mask = m.mask + r * (m.columns / 8);
  const float* x = inputs.row<float>(0);
  int64_t place = m.starts[r], c = 0;
  __m512 sum[N][SUMS];
  for (int b = 0; b < N; b++)
    for (int s = 0; s < SUMS; s++) sum[b][s] = _mm512_setzero_ps();
  for (; WHOLE && c + 64 <= m.columns; c += 64) {
    const uint64_t keep = load64(mask + c / 8);
    _mm_prefetch((const char*)m.values + place * BITS<T> / 8 + AHEAD, _MM_HINT_T0);
    if (T == Type::float32) _mm_prefetch((const char*)m.values + place * 4 + AHEAD + 64, _MM_HINT_T0);
    _mm_prefetch((const char*)mask + c / 8 + AHEAD_MASK, _MM_HINT_T0);
#pragma GCC unroll 2
    for (int g = 0; g < 2; g++) {
      Two w;
      if constexpr (T == Type::bfloat16) w = take_pairs<true>(m.values, place, uint32_t(keep >> (32 * g)));
      else w = take<T, true>(m.values, place, uint32_t(keep >> (32 * g)));
      place += _mm_popcnt_u32(uint32_t(keep >> (32 * g)));
#pragma GCC unroll 8
      for (int b = 0; b < N; b++) {
        const float* xb = x + b * inputs.stride + c + 32 * g;
        __m512 &one = sum[b][2 * g % SUMS], &other = sum[b][(2 * g + 1) % SUMS];
        one = _mm512_fmadd_ps(w.low, _mm512_loadu_ps(xb), one);
        other = _mm512_fmadd_ps(w.high, _mm512_loadu_ps(xb + 16), other);
      }
    }
  }
  for (; c < m.columns; c += 32) {
    const int64_t left = m.columns - c;
    const uint32_t keep = left >= 32 ? load32(mask + c / 8) : (uint32_t)load_bytes(mask + c / 8, left / 8);
    Two w;
    if constexpr (T == Type::bfloat16) w = take_pairs<false>(m.values, place, keep);
    else w = take<T, false>(m.values, place, keep);
    place += _mm_popcnt_u32(keep);
    for (int b = 0; b < N; b++) {
      const float* xb = x + b * inputs.stride + c;
      sum[b][0] = _mm512_fmadd_ps(w.low, _mm512_loadu_ps(xb), sum[b][0]);
      sum[b][1] = _mm512_fmadd_ps(w.high, _mm512_loadu_ps(xb + 16), sum[b][1]);
    }
  }
  for (int b = 0; b < N; b++) out.set(b, r, sum_of(sum[b], SUMS));
}

template <Type T, int N>
TARGET void all_floats(const Matrix& m, const Inputs& inputs, const Output& out, int64_t first, int64_t last) {
  for (int64_t r = first; r < last; r++)
    if (m.starts[r + 1] + OVER <= m.kept()) row_floats<T, N, true>(m, inputs, out, r);
    else row_floats<T, N, false>(m, inputs, out, r);
}

#define ALL_BF16(N, _) all_bf16<N>(m, inputs, out, first, last)
#define ALL_FLOATS(N, T) all_floats<T, N>(m, inputs, out, first, last)
template <Type T> void floats_of(const Matrix& m, const Inputs& inputs, const Output& out, int64_t first, int64_t last) {
  EACH_LANES(ALL_FLOATS, T)
}

void product(const Matrix& m, const Inputs& inputs, const Output& out, int64_t first, int64_t last) {
  if (inputs.layout == Layout::whole) return whole_product(m, inputs, out, first, last);
  if (inputs.layout == Layout::halves) EACH_LANES(ALL_BF16, )
  switch (m.type) {
    case Type::bfloat16: return floats_of<Type::bfloat16>(m, inputs, out, first, last);
    case Type::float16: return floats_of<Type::float16>(m, inputs, out, first, last);
    case Type::float32: return floats_of<Type::float32>(m, inputs, out, first, last);
    default: return avx2.product(m, inputs, out, first, last);  // whole numbers whose groups are not of 32
  }
}

INLINE __m256i to_bf16(__m512 f) {
  const __m512i i = (__m512i)f, last = _mm512_and_si512(_mm512_srli_epi32(i, 16), _mm512_set1_epi32(1));
  const __m512i high = _mm512_add_epi32(_mm512_add_epi32(i, _mm512_set1_epi32(0x7fff)), last);
  const __mmask16 none = _mm512_cmp_ps_mask(f, f, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_mov_epi32(high, none, _mm512_set1_epi32(0x7fc00000)), 16));
}

// 32 weights, of which the last are left away at the end of a row.
INLINE void store(void* out, Type type, int64_t place, int64_t left, Two w) {
  const uint32_t some = left >= 32 ? ~0u : _bzhi_u32(~0u, left);
  if (type == Type::float32) {
    _mm512_mask_storeu_ps(static_cast<float*>(out) + place, some, w.low);
    _mm512_mask_storeu_ps(static_cast<float*>(out) + place + 16, some >> 16, w.high);
    return;
  }
  __m256i low, high;
  if (type == Type::float16) {
    low = _mm512_cvtps_ph(w.low, _MM_FROUND_TO_NEAREST_INT);
    high = _mm512_cvtps_ph(w.high, _MM_FROUND_TO_NEAREST_INT);
  } else {
    low = to_bf16(w.low);
    high = to_bf16(w.high);
  }
  const __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
  _mm512_mask_storeu_epi16(static_cast<uint16_t*>(out) + place, some, both);
}

template <Type T, bool SAME, bool WHOLE> INLINE void unpack_row(const Matrix& m, void* out, Type type, int64_t start, int64_t r) {
  const uint8_t* mask = m.mask + r * (m.columns / 8);
  int64_t place = m.starts[r];
  for (int64_t g = 0; g < m.groups; g++) {
    const int64_t end = g + 1 < m.groups ? (g + 1) * m.group : m.columns;
    const __m512 scale = _mm512_set1_ps(m.scales ? m.scales[r * m.groups + g] : 1);
    for (int64_t c = g * m.group; c < end; c += 32) {
      const int64_t left = end - c;
      const uint32_t keep = left >= 32 ? load32(mask + c / 8) : (uint32_t)load_bytes(mask + c / 8, left / 8);
      const int count = _mm_popcnt_u32(keep);
      if constexpr (SAME && T != Type::float32) {  // bit for bit
        const __m512i w = spread_halves(keep, some_halves<WHOLE>(static_cast<const uint16_t*>(m.values) + place, count));
        _mm512_mask_storeu_epi16(static_cast<uint16_t*>(out) + start + c, left >= 32 ? ~0u : _bzhi_u32(~0u, left), w);
      } else {
        Two w = take<T, WHOLE>(m.values, place, keep);
        if (!SAME) w = {_mm512_mul_ps(w.low, scale), _mm512_mul_ps(w.high, scale)};
        store(out, type, start + c, left, w);
      }
      place += count;
    }
  }
}

template <Type T, bool SAME> struct Unpacked {
  static TARGET void rows(const Matrix& m, void* out, Type type, int64_t first, int64_t last) {
    for (int64_t r = first; r < last; r++) {
      const int64_t start = (r - first) * m.columns;
      if (m.starts[r + 1] + OVER <= m.kept()) unpack_row<T, SAME, true>(m, out, type, start, r);
      else unpack_row<T, SAME, false>(m, out, type, start, r);
    }
  }
};

void unpack(const Matrix& m, void* out, Type type, int64_t first, int64_t last) {
  unpack_by<Unpacked>(m, out, type, first, last);
}

// Whole numbers to bfloat16 by the instruction for it, which takes a seventh of the steps.
template <Type T, bool WHOLE> INLINE_BF16 void numbers_row(const Matrix& m, uint16_t* out, int64_t r) {
  const uint8_t* mask = m.mask + r * (m.columns / 8);
  int64_t place = m.starts[r];
  for (int64_t g = 0; g < m.groups; g++) {
    const int64_t end = g + 1 < m.groups ? (g + 1) * m.group : m.columns;
    const __m512 scale = _mm512_set1_ps(m.scales[r * m.groups + g]);
    for (int64_t c = g * m.group; c < end; c += 32) {
      const int64_t left = end - c;
      const uint32_t keep = left >= 32 ? load32(mask + c / 8) : (uint32_t)load_bytes(mask + c / 8, left / 8);
      _mm_prefetch((const char*)m.values + place * BITS<T> / 8 + AHEAD, _MM_HINT_T0);
      const Two w = take<T, WHOLE>(m.values, place, keep);
      place += _mm_popcnt_u32(keep);
      const __m512bh both = _mm512_cvtne2ps_pbh(_mm512_mul_ps(w.high, scale), _mm512_mul_ps(w.low, scale));
      _mm512_mask_storeu_epi16(out + c, left >= 32 ? ~0u : _bzhi_u32(~0u, left), (__m512i)both);
    }
  }
}

template <Type T> TARGET_BF16 void numbers_of(const Matrix& m, void* out, int64_t first, int64_t last) {
  for (int64_t r = first; r < last; r++) {
    uint16_t* row = static_cast<uint16_t*>(out) + (r - first) * m.columns;
    if (m.starts[r + 1] + OVER <= m.kept()) numbers_row<T, true>(m, row, r);
    else numbers_row<T, false>(m, row, r);
  }
}

void unpack_bf16(const Matrix& m, void* out, Type type, int64_t first, int64_t last) {
  if (type != Type::bfloat16 || !m.whole()) return unpack(m, out, type, first, last);
  if (m.type == Type::int8) numbers_of<Type::int8>(m, out, first, last);
  else numbers_of<Type::int4>(m, out, first, last);
}

Layout layout(const Matrix& m, Type) {
  if (m.whole()) return block_of(m) ? Layout::whole : Layout::floats;
  return m.type == Type::bfloat16 ? Layout::pairs : Layout::floats;
}

// Inputs of more than 16 bits are not rounded to bfloat16.
Layout layout_bf16(const Matrix& m, Type input) {
  return m.type == Type::bfloat16 && input == Type::bfloat16 ? Layout::halves : layout(m, input);
}

int64_t most(const Matrix& m) {
  if (m.whole()) return block_of(m) ? 8 : avx2.most(m);
  return 4;  // in float32 more of them take longer than a tile and a dense product
}

bool runs() {
  return avx2.runs() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vbmi2") &&
         __builtin_cpu_supports("avx512vnni");
}

}  // namespace

const Kernels avx512 = {"avx512", runs, layout, product, unpack, most};
const Kernels avx512_bf16 = {
    "avx512_bf16", [] { return runs() && __builtin_cpu_supports("avx512bf16"); }, layout_bf16, product, unpack_bf16,
    [](const Matrix& m) { return m.type == Type::bfloat16 ? 8 : most(m); }};

}  // namespace packed
#endif
