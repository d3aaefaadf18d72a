// AVX2: eight weights at a time, spread by a table of byte shuffles, in float32.
#include "unpack.h"

#if defined(__x86_64__)
#include <immintrin.h>

#define TARGET __attribute__((target("avx2,fma,f16c,popcnt,bmi,bmi2")))
#define INLINE static TARGET __attribute__((always_inline)) inline

namespace packed {
namespace {

constexpr int64_t AHEAD = 2048;  // bytes that are asked of memory before they are needed
constexpr int64_t OVER = 16;     // values behind a row that a whole load may touch

// The next values, as many as `count`, with no byte behind them read unless WHOLE.
template <Type T, bool WHOLE> INLINE __m128i some(const void* values, int64_t place, int count) {
  constexpr int size = T == Type::int8 ? 1 : 2;
  const uint8_t* from = static_cast<const uint8_t*>(values) + place * size;
  if (WHOLE) return size == 1 ? _mm_loadl_epi64((const __m128i*)from) : _mm_loadu_si128((const __m128i*)from);
  alignas(16) uint8_t copy[16] = {0};
  std::memcpy(copy, from, count * size);
  return _mm_load_si128((const __m128i*)copy);
}

template <bool WHOLE> INLINE __m128i some_int4(const void* values, int64_t place, int count) {
  const uint8_t* from = static_cast<const uint8_t*>(values) + place / 2;
  const int odd = place % 2;
  const uint64_t both = (WHOLE ? load64(from) : load_bytes(from, (count + odd + 1) / 2)) >> (4 * odd);
  const __m128i numbers = _mm_cvtsi64_si128(_pdep_u64(both, 0x0f0f0f0f0f0f0f0full));
  const __m128i eight = _mm_set1_epi8(8);  // extends the sign
  return _mm_sub_epi8(_mm_xor_si128(numbers, eight), eight);
}

template <bool WHOLE> INLINE __m256 take_float32(const void* values, int64_t place, uint32_t keep, int count) {
  const float* from = static_cast<const float*>(values) + place;
  const __m128i places = _mm_loadl_epi64((const __m128i*)TABLES.bytes[keep]);  // 128 for none: only the low bits count
  const __m256i index = _mm256_cvtepi8_epi32(places);
  __m256 weights;
  if (WHOLE) {
    weights = _mm256_loadu_ps(from);
  } else {
    alignas(32) float copy[8] = {0};
    std::memcpy(copy, from, 4 * count);
    weights = _mm256_load_ps(copy);
  }
  return _mm256_andnot_ps(_mm256_castsi256_ps(_mm256_srai_epi32(index, 31)), _mm256_permutevar8x32_ps(weights, index));
}

// Eight weights of a byte of the mask as float32, without their scale.
template <Type T, bool WHOLE> INLINE __m256 take(const void* values, int64_t place, uint32_t keep, int count) {
  if constexpr (T == Type::float32) {
    return take_float32<WHOLE>(values, place, keep, count);
  } else if constexpr (T == Type::int8 || T == Type::int4) {
    __m128i numbers;
    if constexpr (T == Type::int4) numbers = some_int4<WHOLE>(values, place, count);
    else numbers = some<T, WHOLE>(values, place, count);
    const __m128i spread = _mm_shuffle_epi8(numbers, _mm_loadl_epi64((const __m128i*)TABLES.bytes[keep]));
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(spread));
  } else {
    const __m128i spread = _mm_shuffle_epi8(some<T, WHOLE>(values, place, count),
                                            _mm_load_si128((const __m128i*)TABLES.halves[keep]));
    if constexpr (T == Type::float16) return _mm256_cvtph_ps(spread);
    else return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(spread), 16));
  }
}

INLINE float sum_of(__m256 v) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  s = _mm_hadd_ps(s, s);
  return _mm_cvtss_f32(_mm_hadd_ps(s, s));
}

template <Type T, int N, bool WHOLE> INLINE void row_of(const Matrix& m, const Inputs& inputs, const Output& out, int64_t r) {
  constexpr int SUMS = N == 1 ? 4 : N == 2 ? 2 : 1;  // that do not wait for each other
  const uint8_t* mask = m.mask + r * (m.columns / 8);
  const float* x = inputs.row<float>(0);
  int64_t place = m.starts[r];
  __m256 total[N];
  for (int b = 0; b < N; b++) total[b] = _mm256_setzero_ps();
  for (int64_t g = 0; g < m.groups; g++) {
    const int64_t end = g + 1 < m.groups ? (g + 1) * m.group : m.columns;
    __m256 sum[N][SUMS];
    for (int b = 0; b < N; b++)
      for (int s = 0; s < SUMS; s++) sum[b][s] = _mm256_setzero_ps();
    int64_t c = g * m.group;
    for (; WHOLE && c + 64 <= end; c += 64) {
      const uint64_t keep = load64(mask + c / 8);
      _mm_prefetch((const char*)m.values + place * BITS<T> / 8 + AHEAD, _MM_HINT_T0);
      _mm_prefetch((const char*)mask + c / 8 + AHEAD / 4, _MM_HINT_T0);
#pragma GCC unroll 8
      for (int i = 0; i < 8; i++) {
        const uint32_t byte = keep >> (8 * i) & 255;
        const int count = _mm_popcnt_u32(byte);
        const __m256 weights = take<T, true>(m.values, place, byte, count);
        place += count;
#pragma GCC unroll 8
        for (int b = 0; b < N; b++)
          sum[b][i % SUMS] = _mm256_fmadd_ps(weights, _mm256_loadu_ps(x + b * inputs.stride + c + 8 * i), sum[b][i % SUMS]);
      }
    }
    for (; c < end; c += 8) {
      const uint32_t byte = mask[c / 8];
      const int count = _mm_popcnt_u32(byte);
      const __m256 weights = take<T, false>(m.values, place, byte, count);
      place += count;
      for (int b = 0; b < N; b++)
        sum[b][0] = _mm256_fmadd_ps(weights, _mm256_loadu_ps(x + b * inputs.stride + c), sum[b][0]);
    }
    const __m256 scale = _mm256_set1_ps(m.scales ? m.scales[r * m.groups + g] : 1);
    for (int b = 0; b < N; b++)
      for (int s = 0; s < SUMS; s++) total[b] = _mm256_fmadd_ps(sum[b][s], scale, total[b]);
  }
  for (int b = 0; b < N; b++) out.set(b, r, sum_of(total[b]));
}

template <Type T, int N> TARGET void rows_of(const Matrix& m, const Inputs& inputs, const Output& out, int64_t first, int64_t last) {
  for (int64_t r = first; r < last; r++)
    if (m.starts[r + 1] + OVER <= m.kept()) row_of<T, N, true>(m, inputs, out, r);
    else row_of<T, N, false>(m, inputs, out, r);
}

#define ROWS(N, T) rows_of<T, N>(m, inputs, out, first, last)
template <Type T> void batch_of(const Matrix& m, const Inputs& inputs, const Output& out, int64_t first, int64_t last) {
  if (inputs.lanes == 1) return ROWS(1, T);
  return inputs.lanes == 2 ? ROWS(2, T) : ROWS(4, T);
}

void product(const Matrix& m, const Inputs& inputs, const Output& out, int64_t first, int64_t last) {
  switch (m.type) {
    case Type::bfloat16: return batch_of<Type::bfloat16>(m, inputs, out, first, last);
    case Type::float16: return batch_of<Type::float16>(m, inputs, out, first, last);
    case Type::float32: return batch_of<Type::float32>(m, inputs, out, first, last);
    case Type::int8: return batch_of<Type::int8>(m, inputs, out, first, last);
    case Type::int4: return batch_of<Type::int4>(m, inputs, out, first, last);
  }
}

INLINE void store(void* out, Type type, int64_t place, __m256 weights) {
  if (type == Type::float32) {
    _mm256_storeu_ps(static_cast<float*>(out) + place, weights);
    return;
  }
  auto* halves = reinterpret_cast<__m128i*>(static_cast<uint16_t*>(out) + place);
  if (type == Type::float16) {
    _mm_storeu_si128(halves, _mm256_cvtps_ph(weights, _MM_FROUND_TO_NEAREST_INT));
    return;
  }
  const __m256i bits = _mm256_castps_si256(weights);
  const __m256i last = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  __m256i high = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), last);
  const __m256i none = _mm256_castps_si256(_mm256_cmp_ps(weights, weights, _CMP_UNORD_Q));
  high = _mm256_srli_epi32(_mm256_blendv_epi8(high, _mm256_set1_epi32(0x7fc00000), none), 16);
  _mm_storeu_si128(halves, _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1)));
}

template <Type T, bool SAME, bool WHOLE> INLINE void unpack_row(const Matrix& m, void* out, Type type, int64_t start, int64_t r) {
  const uint8_t* mask = m.mask + r * (m.columns / 8);
  int64_t place = m.starts[r];
  for (int64_t g = 0; g < m.groups; g++) {
    const int64_t end = g + 1 < m.groups ? (g + 1) * m.group : m.columns;
    const __m256 scale = _mm256_set1_ps(m.scales ? m.scales[r * m.groups + g] : 1);
    for (int64_t c = g * m.group; c < end; c += 8) {
      const uint32_t byte = mask[c / 8];
      const int count = _mm_popcnt_u32(byte);
      if constexpr (SAME && T != Type::float32) {  // bit for bit
        const __m128i spread = _mm_shuffle_epi8(some<T, WHOLE>(m.values, place, count),
                                                _mm_load_si128((const __m128i*)TABLES.halves[byte]));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(static_cast<uint16_t*>(out) + start + c), spread);
      } else if constexpr (SAME) {
        _mm256_storeu_ps(static_cast<float*>(out) + start + c, take<T, WHOLE>(m.values, place, byte, count));
      } else {
        store(out, type, start + c, _mm256_mul_ps(scale, take<T, WHOLE>(m.values, place, byte, count)));
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

bool runs() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2") &&
         __builtin_cpu_supports("popcnt");  // f16c came with the first of these
}

}  // namespace

const Kernels avx2 = {"avx2", runs, [](const Matrix&, Type) { return Layout::floats; }, product, unpack,
                      [](const Matrix&) -> int64_t { return 4; }};

}  // namespace packed
#endif
