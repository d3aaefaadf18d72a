// A matrix without its zeros, its inputs made ready, and what every instruction set brings. No torch in here, so that
// kernels can be compiled and checked alone (for another processor, or with a sanitizer).
#pragma once
#include <cstdint>
#include <cstring>
#include <vector>

namespace packed {

enum class Type { bfloat16, float16, float32, int8, int4 };
template <Type T> constexpr int BITS = T == Type::float32 ? 32 : T == Type::int8 ? 8 : T == Type::int4 ? 4 : 16;

// (rows, columns), columns a multiple of 8: every row of the mask begins at a byte, lowest bit first.
struct Matrix {
  const uint8_t* mask;     // rows * columns / 8
  const void* values;      // kept weights in their order; int4: two a byte, the first one low
  Type type;
  const int64_t* starts;   // rows + 1: at which value each row begins; int4: every row at a byte
  const float* scales;     // (rows, groups) of whole numbers, else null
  int64_t rows, columns;
  int64_t group;           // columns that share a scale, a multiple of 8; all of them without scales
  int64_t groups;

  int64_t kept() const { return starts[rows]; }
  bool whole() const { return type == Type::int8 || type == Type::int4; }
};

// How a kernel wants its inputs.
enum class Layout {
  halves,  // bfloat16 as they are
  floats,  // float32 in their order
  pairs,   // float32, of every 32 columns first the even ones, then the odd ones: as two bfloat16 lie in 32 bits
  whole,   // int16, with a scale per `block` columns, the largest of which is 32767
};

// (lanes, stride): the batch, padded with rows of zeros to a number that there is a kernel for, and with columns of zeros
// so that 64 can be read from any multiple of 64.
struct Inputs {
  Layout layout;
  int64_t lanes, stride, block = 0, blocks = 0;
  const void* data;
  std::vector<float> scales;          // (lanes, blocks)
  std::vector<uint8_t> own;           // what `data` points to, unless the inputs could be taken as they are
  template <class T> const T* row(int64_t b) const { return static_cast<const T*>(data) + b * stride; }
};
Inputs prepare(const void* data, Type type, int64_t batch, int64_t columns, Layout layout, int64_t block);

// (batch, rows) of a floating type.
struct Output {
  void* data;
  Type type;
  int64_t batch, rows;
  void set(int64_t b, int64_t row, float value) const;
};

// One instruction set. `product` and `unpack` do the rows from `first` to before `last`.
struct Kernels {
  const char* name;
  bool (*runs)();  // on this processor
  Layout (*layout)(const Matrix&, Type input);
  void (*product)(const Matrix&, const Inputs&, const Output&, int64_t first, int64_t last);
  void (*unpack)(const Matrix&, void* out, Type type, int64_t first, int64_t last);
  int64_t (*most)(const Matrix&);  // up to which batch it multiplies without unpacking
};

extern const Kernels scalar, avx2, avx512, avx512_bf16, neon;
const std::vector<const Kernels*>& runnable();  // best first

// Columns of inputs that share a scale: they never reach over a group of the weights. 0: no such block.
inline int64_t block_of(const Matrix& m) {
  if (m.group == m.columns || m.group % 256 == 0) return 256;
  if (m.group % 128 == 0) return 128;
  return m.group % 64 == 0 ? 64 : m.group % 32 == 0 ? 32 : 0;
}

inline uint32_t load32(const uint8_t* p) { uint32_t v; std::memcpy(&v, p, 4); return v; }
inline uint64_t load64(const uint8_t* p) { uint64_t v; std::memcpy(&v, p, 8); return v; }
inline uint64_t load_bytes(const uint8_t* p, int64_t n) { uint64_t v = 0; std::memcpy(&v, p, n); return v; }  // n <= 8
inline uint32_t bits_of(float f) { uint32_t i; std::memcpy(&i, &f, 4); return i; }
inline float float_of(uint32_t i) { float f; std::memcpy(&f, &i, 4); return f; }
inline float from_bfloat16(uint16_t v) { return float_of(uint32_t(v) << 16); }
inline uint16_t to_bfloat16(float f) {  // to nearest, ties to even
  const uint32_t i = bits_of(f);
  if ((i & 0x7fffffffu) > 0x7f800000u) return 0x7fc0;
  return uint16_t((i + 0x7fffu + ((i >> 16) & 1)) >> 16);
}
float from_float16(uint16_t v);
uint16_t to_float16(float f);
inline int8_t from_int4(int v) { return int8_t((v & 15) ^ 8) - 8; }

// For every byte of a mask: where each of its eight weights comes from among the next values, 128 for nowhere.
struct Tables {
  uint8_t bytes[256][8];                // of one byte each
  alignas(16) uint8_t halves[256][16];  // of two
  Tables();
};
extern const Tables TABLES;

inline int64_t lanes_for(int64_t batch) { return batch <= 2 ? batch : batch <= 4 ? 4 : batch <= 6 ? 6 : 8; }

}  // namespace packed
