// Rows of a packed matrix with their zeros, bfloat16, for the dense product of many vectors: nothing is shared between
// threads, so that there is nothing to wait for.
#include "device.cuh"

struct Rows {
  const uint8_t* values;
  const float* scales;  // (all rows, scale_columns), of whole numbers
  uint16_t* y;          // (count, columns)
  int columns, first, count, scale_columns, group;  // group: columns that share a scale, 0: all
};

// Whole numbers times their scale are rounded once, as in PyTorch.
DEVICE uint16_t scaled(const Rows& rows, int number, int row, int column) {
  const int place = rows.group ? column / rows.group : 0;
  return to_bfloat16((float)number * rows.scales[(size_t)row * rows.scale_columns + place]);
}
DEVICE int signed_four(uint32_t bits) { return (int)(bits & 15 ^ 8) - 8; }

// 32 bits of the mask from bit `at` on; what is beyond `end` is zero, and no byte beyond it is read.
DEVICE uint32_t mask_word(const uint8_t* mask, long long at, long long end) {
  uint64_t found = 0;
  const uint8_t* from = mask + at / 8;
  const int bytes = (int)((end + 7) / 8 - at / 8), shift = at & 7;
  for (int i = 0; i < 5; i++)
    if (i < bytes) found |= (uint64_t)from[i] << 8 * i;
  const uint32_t word = (uint32_t)(found >> shift);
  return end - at < 32 ? word & ((1u << (int)(end - at)) - 1) : word;
}

// Mask and values: a warp takes a row, a lane one of 32 columns, whose value is as many places on as there are bits
// before its own.
template <int BITS>
__global__ void unpack(const Rows rows, const uint8_t* mask, const long long* starts) {
  const int lane = threadIdx.x & 31, warps = 8;
  const int local = blockIdx.x * warps + (threadIdx.x >> 5), row = rows.first + local;
  if (local >= rows.count) return;
  const long long begin = (long long)row * rows.columns, end = begin + rows.columns;
  long long place = starts[row];
  uint16_t* y = rows.y + (size_t)local * rows.columns;
  for (int column = 0; column < rows.columns; column += 32) {
    const uint32_t word = mask_word(mask, begin + column, end);
    const long long mine = place + count_bits(word & ((1u << lane) - 1));
    uint16_t found = 0;
    if (word >> lane & 1) {
      if (BITS == 16) found = ((const uint16_t*)rows.values)[mine];
      if (BITS == 8) found = scaled(rows, (int8_t)rows.values[mine], row, column + lane);
      if (BITS == 4) found = scaled(rows, signed_four(rows.values[mine / 2] >> 4 * (mine & 1)), row, column + lane);
    }
    if (column + lane < rows.columns) y[column + lane] = found;
    place += count_bits(word);
  }
}

// 2:4 in the order of two_of_four.cu: a thread takes four neighbours of a row.
template <int BITS> __global__ void unpack_two_of_four(const Rows rows) {
  constexpr int loads = BITS / 2, bytes = 512 * (loads + 1) + (BITS == 4 ? 64 : 0);
  const int fours = rows.columns / 4;
  const long long index = (long long)blockIdx.x * 256 + threadIdx.x;
  const int local = (int)(index / fours), four = (int)(index % fours), row = rows.first + local;
  if (local >= rows.count) return;
  const int g = row % 8, low = row % 16 / 8, j = four % 64 / 8, of_eight = four % 8;
  const int within = 2 * (of_eight % 4) + of_eight / 4, t = within % 4, high = within / 4;  // as the instruction counts
  const int lane = 4 * g + t, which = 2 * high + low;
  const uint8_t* group = rows.values + ((size_t)(row / 16) * ((rows.columns + 255) / 256) + four / 64) * bytes;
  const uint8_t* places = group + 512 * loads + 16 * (4 * g + 2 * (j & 1) + high) + 4 * (j / 2);
  const uint32_t two = *(const uint32_t*)places >> (16 * low + 4 * t) & 15;
  uint16_t value[2];
  for (int i = 0; i < 2; i++) {
    if (BITS == 16) value[i] = ((const uint16_t*)group)[((j * 32 + lane) * 4 + which) * 2 + i];
    if (BITS == 8) {
      const int number = group[512 * (j / 2) + 16 * lane + 8 * (j & 1) + 2 * which + i] - 128;
      value[i] = scaled(rows, number, row, 4 * four);
    }
    if (BITS == 4) {
      const uint32_t word = *(const uint32_t*)(group + 512 * (j / 4) + 16 * lane + 4 * (j & 3));
      const uint16_t scale = *(const uint16_t*)(group + 512 * (loads + 1) + 8 * g + 4 * (j / 4) + 2 * low);
      value[i] = to_bfloat16((float)((int)(word >> (4 * which + 16 * i) & 15) - 8) * from_bfloat16(scale));
    }
  }
  uint16_t* y = rows.y + (size_t)local * rows.columns + 4 * four;
  for (int place = 0; place < 4; place++)
    y[place] = place == (int)(two & 3) ? value[0] : place == (int)(two >> 2) ? value[1] : 0;
}

#ifdef EMULATED
#define LAUNCH(kernel, grid, ...) emulator::run(grid, 256, 0, [&] { kernel(__VA_ARGS__); })
#else
#define LAUNCH(kernel, grid, ...) kernel<<<grid, 256, 0, (cudaStream_t)stream>>>(__VA_ARGS__)
#endif

static int launched() {
#ifdef EMULATED
  return 0;
#else
  const cudaError_t error = cudaGetLastError();
  return error ? 1000 + error : 0;
#endif
}

// y (count, columns), bfloat16: the rows from `first` on. mask null: values are groups of two_of_four.cu. `bits`: 16
// (bfloat16), 8 or 4. Returns 0, -1 for other bits, 1000 and more for an error of CUDA.
extern "C" int optimum_dsa_unpack(const void* mask, const void* values, const void* starts, const void* scales, void* y,
                                  int columns, int first, int count, int bits, int scale_columns, int group,
                                  void* stream) {
  const Rows rows{(const uint8_t*)values, (const float*)scales, (uint16_t*)y, columns, first, count, scale_columns, group};
  const auto* bytes = (const uint8_t*)mask;
  const auto* begins = (const long long*)starts;
  if (bits != 16 && bits != 8 && bits != 4) return -1;
  if (count < 1 || columns < 1) return 0;
  if (mask) {
    const int grid = (count + 7) / 8;
    if (bits == 16) LAUNCH(unpack<16>, grid, rows, bytes, begins);
    if (bits == 8) LAUNCH(unpack<8>, grid, rows, bytes, begins);
    if (bits == 4) LAUNCH(unpack<4>, grid, rows, bytes, begins);
  } else {
    const int grid = (int)(((long long)count * (columns / 4) + 255) / 256);
    if (bits == 16) LAUNCH(unpack_two_of_four<16>, grid, rows);
    if (bits == 8) LAUNCH(unpack_two_of_four<8>, grid, rows);
    if (bits == 4) LAUNCH(unpack_two_of_four<4>, grid, rows);
  }
  return launched();
}
