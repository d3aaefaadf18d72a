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
constexpr int64_t OVER = 128;         // values behind a row that a whole load may touch: 64 bytes of 4 bits

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

// Controls of byte shuffles that make bytes of numbers of 4 bits.
struct Spread {
  alignas(64) uint8_t bytes[64];    // every 8 bytes begin 4 after those before them, as 8 numbers are 4 bytes
  alignas(64) uint8_t bits[2][64];  // where in these 8 bytes the byte begins of which a number is the high half
  Spread() {
    for (int i = 0; i < 64; i++) {
      bytes[i] = i / 8 * 4 + i % 8;
      bits[0][i] = (4 * (i % 8) + 60) % 64;
      bits[1][i] = 4 * (i % 8);  // where numbers begin in the middle of a byte
    }
  }
};
static const Spread SPREAD;

// The next numbers, as many as `count` <= 64, a byte each; those of 4 bits times 16, which keeps their sign.
template <Type T, bool WHOLE> INLINE __m512i some_numbers(const void* values, int64_t place, int count) {
  if constexpr (T == Type::int8) {
    const uint8_t* from = static_cast<const uint8_t*>(values) + place;
    return WHOLE ? _mm512_loadu_si512(from) : _mm512_maskz_loadu_epi8(_bzhi_u64(~0ull, count), from);
  } else {
    const uint8_t* from = static_cast<const uint8_t*>(values) + place / 2;
    const int odd = place % 2, bytes = (count + odd + 1) / 2;
    const __m512i packed = WHOLE ? _mm512_loadu_si512(from) : _mm512_maskz_loadu_epi8(_bzhi_u64(~0ull, bytes), from);
    const __m512i wide = _mm512_permutexvar_epi8(_mm512_load_si512(SPREAD.bytes), packed);
    return _mm512_and_si512(_mm512_multishift_epi64_epi8(_mm512_load_si512(SPREAD.bits[odd]), wide),
                            _mm512_set1_epi8(-16));
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
