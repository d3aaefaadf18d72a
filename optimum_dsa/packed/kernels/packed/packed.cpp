// What kernels share: conversions, tables, and inputs made ready.
#include "packed.h"

#include <algorithm>
#include <cmath>

namespace packed {

float from_float16(uint16_t v) {
  const uint32_t sign = uint32_t(v & 0x8000) << 16, exponent = v >> 10 & 31, fraction = v & 1023;
  if (exponent == 31) return float_of(sign | 0x7f800000u | fraction << 13);
  if (exponent) return float_of(sign | (exponent + 112) << 23 | fraction << 13);
  const float small = float(fraction) * 0x1p-24f;  // subnormal
  return sign ? -small : small;
}

uint16_t to_float16(float f) {  // to nearest, ties to even
  const uint32_t i = bits_of(f), sign = i >> 16 & 0x8000, size = i & 0x7fffffffu;
  if (size > 0x7f800000u) return uint16_t(sign | 0x7e00);
  if (size >= 0x477ff000u) return uint16_t(sign | 0x7c00);  // rounds to beyond the largest
  if (size < 0x38800000u) {
    // Adding 1/2 makes the last bit of a float that of a subnormal, so that the addition rounds.
    return uint16_t(sign | (bits_of(float_of(size) + 0.5f) - 0x3f000000u));
  }
  return uint16_t(sign | ((size + 0xfffu + (size >> 13 & 1)) - 0x38000000u) >> 13);
}

Tables::Tables() {
  for (int mask = 0; mask < 256; mask++) {
    int next = 0;
    for (int i = 0; i < 8; i++) {
      const bool kept = mask >> i & 1;
      bytes[mask][i] = kept ? next : 128;
      halves[mask][2 * i] = kept ? 2 * next : 128;
      halves[mask][2 * i + 1] = kept ? 2 * next + 1 : 128;
      next += kept;
    }
  }
}
const Tables TABLES;

void Output::set(int64_t b, int64_t row, float value) const {
  if (b >= batch) return;  // a lane that only fills up
  const int64_t place = b * rows + row;
  if (type == Type::bfloat16) static_cast<uint16_t*>(data)[place] = to_bfloat16(value);
  else if (type == Type::float16) static_cast<uint16_t*>(data)[place] = to_float16(value);
  else static_cast<float*>(data)[place] = value;
}

static void to_floats(const void* data, Type type, int64_t start, int64_t count, float* out) {
  const auto* halves = static_cast<const uint16_t*>(data) + start;
  if (type == Type::float32) std::memcpy(out, static_cast<const float*>(data) + start, 4 * count);
  else if (type == Type::bfloat16) for (int64_t i = 0; i < count; i++) out[i] = from_bfloat16(halves[i]);
  else for (int64_t i = 0; i < count; i++) out[i] = from_float16(halves[i]);
}

static void to_pairs(float* row, int64_t stride) {
  float odd[16];
  for (int64_t c = 0; c < stride; c += 32) {
    for (int i = 0; i < 16; i++) odd[i] = row[c + 2 * i + 1];
    for (int i = 0; i < 16; i++) row[c + i] = row[c + 2 * i];
    std::copy(odd, odd + 16, row + c + 16);
  }
}

// Rounding each block by itself: one large input costs its neighbours precision, and no others.
static void to_whole(const float* row, int64_t columns, int64_t block, int16_t* out, float* scales) {
  for (int64_t c = 0; c < columns; c += block, scales++) {
    const int64_t end = std::min(c + block, columns);
    float largest = 0;
    for (int64_t i = c; i < end; i++) largest = std::max(largest, std::fabs(row[i]));
    *scales = largest / 32767;
    // Not the inverse of the scale, which overflows where inputs are tiny.
    const float factor = largest > 0 ? 32767 / largest : 0;
    if (!(largest < INFINITY) || !(factor < INFINITY)) {
      // NaN and infinity have to come out as NaN; what is smaller than any float's inverse counts as zero.
      *scales = largest < INFINITY ? 0 : NAN;
      continue;
    }
    for (int64_t i = c; i < end; i++) {
      const float scaled = row[i] * factor;
      out[i] = int16_t(scaled + (scaled < 0 ? -0.5f : 0.5f));
      if (row[i] != row[i]) *scales = NAN;
    }
  }
}

Inputs prepare(const void* data, Type type, int64_t batch, int64_t columns, Layout layout, int64_t block) {
  Inputs inputs;
  inputs.layout = layout;
  inputs.lanes = lanes_for(batch);
  inputs.block = block;
  const bool as_is = (layout == Layout::halves && type == Type::bfloat16) ||
                     (layout == Layout::floats && type == Type::float32);
  if (as_is && columns % 64 == 0 && inputs.lanes == batch) {
    inputs.stride = columns;
    inputs.data = data;
    return inputs;
  }
  const int64_t stride = inputs.stride = (columns + 63) / 64 * 64;
  const int64_t size = layout == Layout::floats || layout == Layout::pairs ? 4 : 2;
  inputs.own.resize(inputs.lanes * stride * size);
  inputs.data = inputs.own.data();
  if (layout == Layout::halves) {
    for (int64_t b = 0; b < batch; b++)
      std::memcpy(inputs.own.data() + 2 * b * stride, static_cast<const uint16_t*>(data) + b * columns, 2 * columns);
  } else if (layout == Layout::whole) {
    inputs.blocks = (columns + block - 1) / block;
    inputs.scales.resize(inputs.lanes * inputs.blocks);
    std::vector<float> row(columns);
    for (int64_t b = 0; b < batch; b++) {
      to_floats(data, type, b * columns, columns, row.data());
      to_whole(row.data(), columns, block, reinterpret_cast<int16_t*>(inputs.own.data()) + b * stride,
               inputs.scales.data() + b * inputs.blocks);
    }
  } else {
    for (int64_t b = 0; b < batch; b++) {
      float* row = reinterpret_cast<float*>(inputs.own.data()) + b * stride;
      to_floats(data, type, b * columns, columns, row);
      if (layout == Layout::pairs) to_pairs(row, stride);
    }
  }
  return inputs;
}

const std::vector<const Kernels*>& runnable() {
  static const std::vector<const Kernels*> found = [] {
    std::vector<const Kernels*> some;
#if defined(__x86_64__)
    for (const Kernels* one : {&avx512_bf16, &avx512, &avx2})
      if (one->runs()) some.push_back(one);
#elif defined(__aarch64__)
    some.push_back(&neon);
#endif
    some.push_back(&scalar);
    return some;
  }();
  return found;
}

}  // namespace packed
