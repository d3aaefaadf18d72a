// What the kernels of AVX-512 share: weights spread by a mask in a register.
#pragma once
#include "packed.h"

#include <immintrin.h>

#define TARGET \
  __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vbmi2,avx512vnni,popcnt,bmi,bmi2,fma,f16c")))
#define INLINE static TARGET __attribute__((always_inline)) inline

namespace packed {

constexpr int64_t AHEAD = 2048;       // bytes of values that are asked of memory before they are needed
constexpr int64_t AHEAD_MASK = 512;
constexpr int64_t OVER = 64;          // values behind a row that a whole load may touch

// vpexpand on Zen 4 waits for the old content of its destination even where it zeroes it: a cleared one, which waits for
// nothing, doubles the speed. Written out, as a compiler sees no use in clearing.
INLINE __m512i spread_halves(uint32_t keep, __m512i some) {
  __m512i out;
  asm("vpxord %x0,%x0,%x0\n\tvpexpandw %1,%0%{%2%}%{z%}" : "=&v"(out) : "v"(some), "Yk"((__mmask32)keep));
  return out;
}
INLINE __m512i spread_bytes(uint64_t keep, __m512i some) {
  __m512i out;
  asm("vpxord %x0,%x0,%x0\n\tvpexpandb %1,%0%{%2%}%{z%}" : "=&v"(out) : "v"(some), "Yk"((__mmask64)keep));
  return out;
}
INLINE __m512i spread_words(uint32_t keep, __m512i some) {
  __m512i out;
  asm("vpxord %x0,%x0,%x0\n\tvpexpandd %1,%0%{%2%}%{z%}" : "=&v"(out) : "v"(some), "Yk"((__mmask16)keep));
  return out;
}

// The next values of 16 bits, as many as `count` <= 32; WHOLE: bytes behind them may be read.
template <bool WHOLE> INLINE __m512i some_halves(const uint16_t* from, int count) {
  return WHOLE ? _mm512_loadu_si512(from) : _mm512_maskz_loadu_epi16(_bzhi_u32(~0u, count), from);
}

// The next numbers, as many as `count` <= 64, a byte each.
template <Type T, bool WHOLE> INLINE __m512i some_numbers(const void* values, int64_t place, int count) {
  if constexpr (T == Type::int8) {
    const uint8_t* from = static_cast<const uint8_t*>(values) + place;
    return WHOLE ? _mm512_loadu_si512(from) : _mm512_maskz_loadu_epi8(_bzhi_u64(~0ull, count), from);
  } else {
    // 64 numbers of 4 bits are 32 bytes, and one more where they begin in the middle of a byte.
    const uint8_t* from = static_cast<const uint8_t*>(values) + place / 2;
    const int odd = place % 2, bytes = (count + odd + 1) / 2;
    __m256i low, high;
    if (WHOLE) {
      low = _mm256_loadu_si256((const __m256i*)from);
      high = _mm256_loadu_si256((const __m256i*)(from + 8));
    } else {
      low = _mm256_maskz_loadu_epi8(_bzhi_u64(~0ull, bytes), from);
      high = _mm256_maskz_loadu_epi8(_bzhi_u64(~0ull, bytes > 8 ? bytes - 8 : 0), from + 8);
    }
    const __m256i both = _mm256_shrdv_epi64(low, high, _mm256_set1_epi64x(4 * odd));
    const __m512i wide = _mm512_cvtepu8_epi16(both);
    const __m512i halves = _mm512_or_si512(wide, _mm512_slli_epi16(wide, 4));
    // A table takes the sign along, and looks at the low four bits only once the others are gone.
    const __m512i table = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1));
    return _mm512_shuffle_epi8(table, _mm512_and_si512(halves, _mm512_set1_epi8(15)));
  }
}

// LANES(N, ...) for the N of the inputs.
#define EACH_LANES(LANES, ...)                                                                                   \
  switch (inputs.lanes) {                                                                                        \
    case 1: return LANES(1, __VA_ARGS__);                                                                        \
    case 2: return LANES(2, __VA_ARGS__);                                                                        \
    case 4: return LANES(4, __VA_ARGS__);                                                                        \
    case 6: return LANES(6, __VA_ARGS__);                                                                        \
    default: return LANES(8, __VA_ARGS__);                                                                       \
  }

// Products with whole numbers: inputs in Layout::whole.
void whole_product(const Matrix& m, const Inputs& inputs, const Output& out, int64_t first, int64_t last);

}  // namespace packed
