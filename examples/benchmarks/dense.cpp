// What packed products are held against: the best product with a dense bfloat16 matrix of our own, and reading memory.
#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace {

constexpr int AHEAD = 2048;  // bytes that are asked of memory before they are needed

float sum_of(__m512 v) { return _mm512_reduce_add_ps(v); }

template <int N> void rows_of(const uint16_t* weight, const uint16_t* x, float* y, int64_t first, int64_t last, int64_t rows, int64_t columns) {
  constexpr int SUMS = N == 1 ? 4 : N == 2 ? 2 : 1;
  for (int64_t r = first; r < last; r++) {
    const uint16_t* w = weight + r * columns;
    __m512 sum[N][SUMS];
    for (auto& one : sum) std::fill(one, one + SUMS, _mm512_setzero_ps());
    for (int64_t c = 0; c < columns; c += 128) {
      for (int i = 0; i < 4; i++) _mm_prefetch((const char*)(w + c + 32 * i) + AHEAD, _MM_HINT_T0);
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++) {
        const __m512bh some = (__m512bh)_mm512_loadu_si512(w + c + 32 * i);
        for (int b = 0; b < N; b++)
          sum[b][i % SUMS] =
              _mm512_dpbf16_ps(sum[b][i % SUMS], some, (__m512bh)_mm512_loadu_si512(x + b * columns + c + 32 * i));
      }
    }
    for (int b = 0; b < N; b++) {
      float whole = 0;
      for (int s = 0; s < SUMS; s++) whole += sum_of(sum[b][s]);
      y[b * rows + r] = whole;
    }
  }
}

}  // namespace

// weight (rows, columns), x (batch, columns) bfloat16, y (batch, rows) float32; columns a multiple of 128, batch 1, 4 or 8.
extern "C" void dense(const uint16_t* weight, const uint16_t* x, float* y, int64_t batch, int64_t rows, int64_t columns, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static, 1)
  for (int t = 0; t < threads; t++) {
    const int64_t first = rows * t / threads, last = rows * (t + 1) / threads;
    if (batch == 1) rows_of<1>(weight, x, y, first, last, rows, columns);
    else if (batch == 4) rows_of<4>(weight, x, y, first, last, rows, columns);
    else rows_of<8>(weight, x, y, first, last, rows, columns);
  }
}

// Reads all bytes, a multiple of 256 for each thread.
extern "C" int64_t read_all(const uint8_t* data, int64_t bytes, int threads) {
  int64_t found = 0;
#pragma omp parallel for num_threads(threads) schedule(static, 1) reduction(+ : found)
  for (int t = 0; t < threads; t++) {
    const uint8_t* p = data + bytes / threads * t;
    __m512i sum[4] = {};
    for (int64_t i = 0; i + 256 <= bytes / threads; i += 256)
      for (int k = 0; k < 4; k++) {
        _mm_prefetch((const char*)p + i + 64 * k + AHEAD, _MM_HINT_T0);
        sum[k] = _mm512_add_epi64(sum[k], _mm512_loadu_si512(p + i + 64 * k));
      }
    for (const __m512i& one : sum) found += _mm512_reduce_add_epi64(one);
  }
  return found;
}
