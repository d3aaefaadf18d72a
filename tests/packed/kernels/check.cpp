// Kernels without torch, on buffers that end where their contents end: for a sanitizer, or for another processor.
//
//   g++ -std=c++20 -O1 -g -w -fsanitize=address,undefined -fno-sanitize=alignment \
//       tests/packed/kernels/check.cpp optimum_dsa/packed/kernels/packed/*.cpp -o check && ./check
//   aarch64-linux-gnu-g++ -std=c++20 -O3 -w -static \
//       tests/packed/kernels/check.cpp optimum_dsa/packed/kernels/packed/*.cpp -o check && qemu-aarch64 ./check
#include "../../../optimum_dsa/packed/kernels/packed/packed.h"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>

using namespace packed;

namespace {

std::mt19937 random_(0);
float uniform() { return std::uniform_real_distribution<float>(-1, 1)(random_); }

// On the heap, of exactly so many bytes: a read behind the last is seen.
template <class T> std::unique_ptr<T[]> exactly(const std::vector<T>& from) {
  auto copy = std::make_unique_for_overwrite<T[]>(from.size());
  std::copy(from.begin(), from.end(), copy.get());
  return copy;
}

struct Case {
  std::vector<double> dense;
  std::unique_ptr<uint8_t[]> mask, values;
  std::unique_ptr<int64_t[]> starts;
  std::unique_ptr<float[]> scales;
  Matrix m;
};

void append(std::vector<uint8_t>& bytes, const void* from, int size) {
  bytes.insert(bytes.end(), static_cast<const uint8_t*>(from), static_cast<const uint8_t*>(from) + size);
}

Case make(Type type, int64_t rows, int64_t columns, int64_t group, double share) {
  Case c;
  const bool whole = type == Type::int8 || type == Type::int4;
  const int64_t groups = whole && group ? (columns + group - 1) / group : 1;
  std::vector<uint8_t> mask(rows * columns / 8), values;
  std::vector<int64_t> starts{0};
  std::vector<float> scales(rows * groups);
  for (float& scale : scales) scale = uniform() + 1.5f;
  for (int64_t r = 0; r < rows; r++) {
    int64_t count = 0;
    for (int64_t i = 0; i < columns; i++) {
      const bool keep = r == rows - 1 || (r != 0 && std::abs(uniform()) > share);
      double weight = 0;
      if (keep) {
        mask[(r * columns + i) / 8] |= 1 << (i % 8);
        const float f = uniform();
        const float scale = scales[r * groups + (whole && group ? i / group : 0)];
        if (type == Type::float32) append(values, &f, 4), weight = f;
        else if (type == Type::int8) {
          const auto n = int8_t(f * 127);
          append(values, &n, 1), weight = double(n) * scale;
        } else if (type == Type::int4) {
          const int n = int(f * 8);
          if (count % 2) values.back() |= n << 4;
          else values.push_back(n & 15);
          weight = double(n) * scale;
        } else {
          const uint16_t half = type == Type::bfloat16 ? to_bfloat16(f) : to_float16(f);
          append(values, &half, 2), weight = type == Type::bfloat16 ? from_bfloat16(half) : from_float16(half);
        }
        count++;
      }
      c.dense.push_back(weight);
    }
    starts.push_back(starts.back() + count + (type == Type::int4 ? count % 2 : 0));
  }
  c.mask = exactly(mask), c.values = exactly(values), c.starts = exactly(starts), c.scales = exactly(scales);
  c.m = {c.mask.get(), c.values.get(), type, c.starts.get(), whole ? c.scales.get() : nullptr,
         rows, columns, whole && group ? group : columns, groups};
  return c;
}

double read(const void* data, Type type, int64_t place) {
  if (type == Type::float32) return static_cast<const float*>(data)[place];
  const uint16_t half = static_cast<const uint16_t*>(data)[place];
  return type == Type::bfloat16 ? from_bfloat16(half) : from_float16(half);
}

// Some rows alone, as the matrix of one of several experts: `starts` say where in the values of all they begin.
Matrix part_of(const Matrix& m, int64_t first, int64_t last) {
  Matrix part = m;
  part.mask += first * m.columns / 8, part.starts += first, part.rows = last - first;
  if (m.scales) part.scales += first * m.groups;
  return part;
}

// The largest error of a product, in parts of the largest that its terms allow; of unpacking where `batch` is 0.
double error_of(const Kernels& kernels, const Case& c, Type type, int64_t batch) {
  const Matrix& m = c.m;
  const int64_t size = type == Type::float32 ? 4 : 2;
  double worst = 0;
  if (batch == 0) {
    auto out = std::make_unique<uint8_t[]>(m.rows * m.columns * size);
    const int64_t half = m.rows / 2;
    kernels.unpack(m, out.get(), type, 0, half);
    kernels.unpack(part_of(m, half, m.rows), out.get() + half * m.columns * size, type, 0, m.rows - half);
    for (int64_t i = 0; i < m.rows * m.columns; i++)
      worst = std::max(worst, std::abs(read(out.get(), type, i) - c.dense[i]) / (std::abs(c.dense[i]) + 1e-3));
    return worst;
  }
  std::vector<uint8_t> bytes;
  for (int64_t i = 0; i < batch * m.columns; i++) {
    const float f = uniform();
    const uint16_t half = type == Type::bfloat16 ? to_bfloat16(f) : to_float16(f);
    append(bytes, type == Type::float32 ? (const void*)&f : &half, size);
  }
  const auto data = exactly(bytes);
  const int64_t half = m.rows / 2;
  auto out = std::make_unique<uint8_t[]>(batch * m.rows * size);
  const Inputs inputs = prepare(data.get(), type, batch, m.columns, kernels.layout(m, type), block_of(m));
  kernels.product(m, inputs, {out.get(), type, batch, m.rows}, 0, half);
  const int64_t rest = m.rows - half;
  auto own = std::make_unique<uint8_t[]>(batch * rest * size);
  kernels.product(part_of(m, half, m.rows), inputs, {own.get(), type, batch, rest}, 0, rest);
  for (int64_t b = 0; b < batch; b++)
    std::memcpy(out.get() + (b * m.rows + half) * size, own.get() + b * rest * size, rest * size);
  for (int64_t b = 0; b < batch; b++)
    for (int64_t r = 0; r < m.rows; r++) {
      double sum = 0, terms = 1e-2;  // a rounded input may be one whose weight is gone
      for (int64_t i = 0; i < m.columns; i++) {
        const double term = c.dense[r * m.columns + i] * read(data.get(), type, b * m.columns + i);
        sum += term, terms += std::abs(term);
      }
      worst = std::max(worst, std::abs(read(out.get(), type, b * m.rows + r) - sum) / terms);
    }
  return worst;
}

}  // namespace

int main() {
  int failed = 0, done = 0;
  for (const Kernels* kernels : runnable()) {
    double worst = 0;
    for (Type type : {Type::bfloat16, Type::float16, Type::float32, Type::int8, Type::int4})
      for (int64_t columns : {8, 40, 64, 72, 128, 200, 328, 576})
        for (int64_t group : {0, 8, 24, 32, 64, 96, 128})
          for (double share : {0.0, 0.5, 1.0}) {
            if (group && type != Type::int8 && type != Type::int4) continue;
            const Case c = make(type, 1 + random_() % 12, columns, group, share);
            for (Type input : {Type::bfloat16, Type::float16, Type::float32})
              for (int64_t batch = 0; batch <= kernels->most(c.m); batch++, done++) {
                const double error = error_of(*kernels, c, input, batch);
                worst = std::max(worst, error);
                if (error <= 1.0 / 256) continue;
                failed++;
                std::printf("%s: type %d, %ld columns, group %ld, share %g, input %d, batch %ld: error %g\n",
                            kernels->name, int(type), long(columns), long(group), share, int(input), long(batch), error);
              }
          }
    std::printf("%s: largest error %g\n", kernels->name, worst);
  }
  std::printf("%d of %d failed\n", failed, done);
  return failed != 0;
}
