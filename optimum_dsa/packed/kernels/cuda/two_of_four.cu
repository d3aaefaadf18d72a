// y = x · Wᵀ for W with at most two of four neighbours kept, and 1 to 8 rows of x: the tensor core itself puts the kept
// weights in their places (mma.sp), so that only their bytes are left to be paid.
//
// Weights lie in the order in which lanes load them (`two_of_four.py` packs them). A group is 16 rows x 256 columns, eight
// instructions, contiguous:
//   bfloat16  [8 instructions][32 lanes][16 bytes] | [32][16] places                                      4608 bytes
//   8 bits    [4 pairs of instructions][32][16]    | places; one scale a row, apart                       2560 bytes
//   4 bits    [2 fours of instructions][32][16]    | places | [8 rows][2 halves][rows r, r + 8] scales    1600 bytes
// Of places, lanes 4g and 4g + 1 hold those of the even instructions, 4g + 2 and 4g + 3 those of the odd ones. Columns are
// permuted within 32, by whole fours, so that a lane's four registers of x are 16 neighbouring bytes of shared memory.
//
// A block is `high` x `deep` warps: `high` tiles of 16 rows, whose columns `deep` warps share; where x does not fit into
// shared memory, or rows are few, `parts` blocks share the columns of a tile. Each warp has DEPTH groups on their way to
// its registers at every moment, across tiles too, the first before x is there: each load is issued again as soon as
// its instruction has used the register.
#include "device.cuh"

struct Work {
  const uint8_t* weights;
  const uint16_t* x;
  const float* scales;
  uint16_t* y;
  float* sums;    // (parts, batch, rows), where parts > 1
  int* arrived;   // (units,), zero before and after
  int rows, columns, batch;
  int tiles, groups;        // of 16 rows, of 256 columns
  int high, deep;           // warps of a block
  int parts, part_groups;   // blocks that share the columns of a tile, and the groups of each
  int units, wide;          // `high` tiles each; blocks next to each other, each of which takes every wide-th unit
  int shift, pitch;         // rows of x in shared memory, 1 << shift: 1, 2, 4 or 8; bytes from one to the next
  int at_sums;              // where shared memory holds the sums of warps, after x
  bool early;
};
constexpr uint32_t AT_X = 128;  // before it: whether this block is the last of its parts
constexpr int SUMS = 20;        // floats from one vector's 16 sums to the next: no conflict of banks

template <int BITS> struct Format {
  static constexpr int loads = BITS / 2;  // of 16 bytes, a lane and group
  static constexpr bool scaled = BITS == 4;
  static constexpr uint32_t bytes = 512 * (loads + 1) + (scaled ? 64 : 0);
};
template <int BITS> struct Group {
  uint4 values[Format<BITS>::loads], places;
  uint2 scales;  // bfloat16: of rows g and g + 8 for the first 128 columns, then for the others
};

DEVICE uint32_t word(uint4 four, int index) {
  return index == 0 ? four.x : index == 1 ? four.y : index == 2 ? four.z : four.w;
}

// The four registers of A for instruction `j`, of whole numbers made without a conversion: a byte or 4 bits become the
// last bits of a great number, of which that number, and the offset that made them positive, are taken away.
template <int BITS> DEVICE void expand(uint32_t (&a)[4], const Group<BITS>& group, int j) {
#pragma unroll
  for (int i = 0; i < 4; i++) {
    if (BITS == 16) a[i] = word(group.values[j], i);
    if (BITS == 8) {  // float16: 1024 + byte - (1024 + 128)
      const uint32_t bytes = word(group.values[j / 2], 2 * (j & 1) + i / 2);
      a[i] = add_float16_pairs(pick_bytes(bytes, 0x64646464u, i & 1 ? 0x4342 : 0x4140), 0xe480e480u);
    }
    if (BITS == 4)  // bfloat16: 128 + 4 bits - (128 + 8)
      a[i] = add_bfloat16_pairs(and_or(word(group.values[j / 4], j & 3) >> 4 * i, 0x000f000fu, 0x43004300u), 0xc308c308u);
  }
}

// One group. `chains`: two independent sums; of 4 bits one per half of the columns, which its scales bring into `total`.
// `refill(i)` loads part i of the group to come: values, then places, then scales.
template <int BITS, bool ONE, class Refill>
DEVICE void multiply(float (&chains)[2][4], float (&total)[4], const Group<BITS>& group, uint32_t x, Refill refill) {
  constexpr int loads = Format<BITS>::loads;
  constexpr bool scaled = Format<BITS>::scaled, FLOAT16 = BITS == 8;
  if (scaled)
    for (int i = 0; i < 4; i++) chains[0][i] = chains[1][i] = 0;
#pragma unroll
  for (int j = 0; j < 8; j++) {
    uint32_t a[4];
    const uint4 b = load_shared(x + 64 * j);
    const uint32_t places = word(group.places, j / 2);
    expand<BITS>(a, group, j);
    float (&chain)[4] = chains[scaled ? j / 4 : j & 1];
    if (j & 1)
      multiply_sparse<FLOAT16, 1>(chain, a, b, places);
    else
      multiply_sparse<FLOAT16, 0>(chain, a, b, places);
    if ((j + 1) % (8 / loads) == 0) refill(j / (8 / loads));
  }
  refill(loads);
  if (scaled) {
    const uint2 s = group.scales;
#pragma unroll
    for (int i = 0; i < 4; i += ONE ? 2 : 1)  // of one vector, the second column is nothing
      total[i] += from_bfloat16(s.x >> 8 * (i & 2)) * chains[0][i] + from_bfloat16(s.y >> 8 * (i & 2)) * chains[1][i];
    refill(loads + 1);
  }
}

// Eight columns of x from global memory, as four pairs; of 8 bits in float16. What is beyond the last column is zero.
template <int BITS> DEVICE uint4 eight_columns(const Work& work, const uint16_t* row, int column) {
  uint32_t pairs[4] = {0, 0, 0, 0};
  if (work.columns % 8 == 0) {
    if (column < work.columns) {
      const uint4 found = load_input(row + column);
      for (int i = 0; i < 4; i++) pairs[i] = word(found, i);
    }
  } else {
    for (int i = 0; i < 8; i++)
      if (column + i < work.columns) pairs[i / 2] |= (uint32_t)row[column + i] << 16 * (i & 1);
  }
  if (BITS == 8)
    for (int i = 0; i < 4; i++)
      pairs[i] = to_float16(from_bfloat16(pairs[i])) | (uint32_t)to_float16(from_bfloat16(pairs[i] >> 16)) << 16;
  return make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
}

// This block's columns of x into shared memory: of each 16, the pairs 0 2 4 6, then 1 3 5 7.
template <int BITS> DEVICE void stage_input(const Work& work, uint32_t to, int first, int last, int threads) {
  for (int sixteen = threadIdx.x; sixteen < (last - first) * 16; sixteen += threads) {
    const int column = first * 256 + 16 * sixteen;
    const uint32_t other = 16 * (sixteen >> 2 & 1);  // half of the lanes store the second part first: no conflicts
    for (int v = 0; v < work.batch; v++) {
      const uint16_t* row = work.x + (size_t)v * work.columns;
      const uint4 p = eight_columns<BITS>(work, row, column), q = eight_columns<BITS>(work, row, column + 8);
      const uint4 even = make_uint4(p.x, p.z, q.x, q.z), odd = make_uint4(p.y, p.w, q.y, q.w);
      const uint32_t at = to + v * work.pitch + 32 * sixteen;
      store_shared(at + other, other ? odd : even);
      store_shared(at + 16 - other, other ? even : odd);
    }
  }
}

template <int BITS> DEVICE void write(const Work& work, int vector, int row, float sum) {
  if (BITS == 8) sum *= work.scales[row];
  work.y[(size_t)vector * work.rows + row] = to_bfloat16(sum);
}

// The sums of a block's warps over their columns, and of `parts` blocks: the last one to arrive adds them up, in their
// order, so that every run gives the same bits.
template <int BITS, int WARPS>
DEVICE void finish(const Work& work, float (&total)[4], uint32_t shared, int unit, int part, int turn) {
  const int thread = anew(threadIdx.x), lane = thread & 31, warp = thread >> 5, g = lane >> 2, t = lane & 3;
  const int shift = work.shift, vectors = 1 << shift;  // no division, which would take registers
  const uint32_t sums = shared + work.at_sums + turn * (WARPS * vectors * SUMS * 4);
  const uint32_t mine = sums + (warp * vectors * SUMS + 2 * t * SUMS + g) * 4;
  for (int i = 0; i < 4; i++)  // i & 1: the vector, i & 2: row g + 8
    if (2 * t + (i & 1) < vectors) store_shared_float(mine + (i & 1) * 4 * SUMS + (i & 2) * 16, total[i]);
  sync_block();
  const int outputs = work.high * vectors * 16;
  for (int i = thread; i < outputs * 4; i += WARPS * 32) {  // four lanes an output: each adds every fourth warp
    const int output = i >> 2, quarter = i & 3, tile = output >> 4 >> shift, v = output >> 4 & (vectors - 1);
    const int row = (unit * work.high + tile) * 16 + output % 16;
    float sum = 0;
    for (int k = quarter; k < work.deep; k += 4)
      sum += load_shared_float(sums + (((tile * work.deep + k) * vectors + v) * SUMS + output % 16) * 4);
    sum += from_neighbour(sum, 1);
    sum += from_neighbour(sum, 2);
    if (quarter == 0 && row < work.rows && v < work.batch) {
      if (work.parts == 1)
        write<BITS>(work, v, row, sum);
      else
        store_part(work.sums + ((size_t)part * work.batch + v) * work.rows + row, sum);
    }
  }
  if (work.parts == 1) return;
  fence();
  sync_block();
  if (thread == 0) {
    fence();
    store_shared_float(shared, add_one(work.arrived + unit) == work.parts - 1);
  }
  sync_block();
  if (load_shared_float(shared) == 0) return;
  fence();
  for (int output = thread; output < outputs; output += WARPS * 32) {
    const int v = output >> 4 & (vectors - 1), row = (unit * work.high + (output >> 4 >> shift)) * 16 + output % 16;
    if (row >= work.rows || v >= work.batch) continue;
    float sum = 0;
    for (int k = 0; k < work.parts; k++) sum += load_part(work.sums + ((size_t)k * work.batch + v) * work.rows + row);
    write<BITS>(work, v, row, sum);
  }
  if (thread == 0) work.arrived[unit] = 0;
}

template <int BITS, bool ONE, int DEPTH, int WARPS, int BLOCKS>
__global__ void __launch_bounds__(WARPS * 32, BLOCKS) two_of_four(const Work work) {
  constexpr int loads = Format<BITS>::loads;
  constexpr uint32_t bytes = Format<BITS>::bytes;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
  const int column = blockIdx.x % work.wide, part = blockIdx.x / work.wide;
  const int tile = warp / work.deep, way = warp % work.deep;
  const int first = part * work.part_groups;
  const int last = work.groups < first + work.part_groups ? work.groups : first + work.part_groups;
  const int each = last - first > way ? (last - first - way + work.deep - 1) / work.deep : 0;  // groups a unit, this warp
  const int units = (work.units - column + work.wide - 1) / work.wide, steps = each * units;
  const uint32_t shared = shared_base();
  if (work.early) let_the_next_begin();

  // The cursor of the loads, DEPTH groups ahead of the products.
  int left = steps, loaded = 0, loading = column;
  auto start_of = [&](int unit) {
    int which = unit * work.high + tile;
    if (which >= work.tiles) which = work.tiles - 1;  // the last unit may have fewer tiles: read one twice, write none
    return work.weights + ((size_t)which * work.groups + first + way) * bytes + 16 * lane;
  };
  const int to_scales = 512 * (loads + 1) + 8 * g - 16 * lane;
  const uint8_t* next = start_of(loading);
  auto advance = [&] {
    left--;
    next += (size_t)work.deep * bytes;
    if (++loaded == each) {
      loaded = 0;
      loading += work.wide;
      if (left > 0) next = start_of(loading);
    }
  };
  Group<BITS> ahead[DEPTH];
  auto load = [&](Group<BITS>& group, int piece, bool wanted) {
    if (piece < loads)
      load_weights(group.values[piece], next + 512 * piece, wanted);
    else if (piece == loads)
      load_weights(group.places, next + 512 * loads, wanted);
    else
      load_weights(group.scales, next + to_scales, wanted);
  };
#pragma unroll
  for (int slot = 0; slot < DEPTH; slot++) {
    ahead[slot] = Group<BITS>{};
#pragma unroll
    for (int piece = 0; piece < loads + 1 + Format<BITS>::scaled; piece++) load(ahead[slot], piece, left > 0);
    if (left > 0) advance();
  }
  if (work.early) wait_for_the_one_before();
  stage_input<BITS>(work, shared + AT_X, first, last, WARPS * 32);
  sync_block();

  float chains[2][4] = {}, total[4] = {};
  const uint32_t start = shared + AT_X + (g & ((1 << work.shift) - 1)) * work.pitch + 16 * t + 512 * way;
  uint32_t x = start;
  int unit = column, done = 0, turn = 0;
  auto end_unit = [&] {
    if (!Format<BITS>::scaled)
      for (int i = 0; i < 4; i++) total[i] = chains[0][i] + chains[1][i];
    finish<BITS, WARPS>(work, total, shared, unit, part, turn);
    for (int i = 0; i < 4; i++) chains[0][i] = chains[1][i] = total[i] = 0;
    unit += work.wide, turn ^= 1, done = 0, x = start;
  };
  if (each == 0) {  // more warps than groups: this one only takes part in the barriers
    for (int i = 0; i < units; i++) end_unit();
    return;
  }
  for (int step = 0; step < steps;) {
#pragma unroll
    for (int slot = 0; slot < DEPTH; slot++) {
      if (step >= steps) break;
      const bool more = left > 0;
      multiply<BITS, ONE>(chains, total, ahead[slot], x, [&](int piece) { load(ahead[slot], piece, more); });
      if (more) advance();
      step++;
      x += 512 * work.deep;
      if (++done == each) end_unit();
    }
  }
}

static int divided(int number, int by) { return (number + by - 1) / by; }

// How the work is cut into blocks: bytes of shared memory of a block; -1 where it cannot be cut so, -2 where x does not fit.
// `resident`: blocks that stay on a multiprocessor and take one unit after the other; 0: a block for each unit.
static int cut(Work& work, int warps, int resident, int multiprocessors, int limit) {
  if (warps % work.high || work.columns % 4 || work.columns < 4 || work.parts < 1) return -1;
  work.tiles = divided(work.rows, 16);
  work.groups = divided(work.columns, 256);
  work.deep = warps / work.high;
  work.units = divided(work.tiles, work.high);
  work.part_groups = divided(work.groups, work.parts);
  work.parts = divided(work.groups, work.part_groups);
  work.shift = work.batch == 1 ? 0 : work.batch == 2 ? 1 : work.batch <= 4 ? 2 : 3;
  work.pitch = work.part_groups * 512 + 64;
  work.at_sums = AT_X + (work.pitch << work.shift);
  work.wide = work.units;
  if (resident > 0) {
    const int most = resident * multiprocessors / work.parts;
    if (work.wide > most) work.wide = most < 1 ? 1 : most;
  }
  const int total = work.at_sums + (2 * warps * SUMS * 4 << work.shift);
  return total > limit ? -2 : total;
}

template <int BITS, bool ONE, int DEPTH, int WARPS, int BLOCKS>
static int launch(const Work& work, int shared, void* stream) {
  const int grid = work.wide * work.parts;
  const auto kernel = two_of_four<BITS, ONE, DEPTH, WARPS, BLOCKS>;
#ifdef EMULATED
  emulator::run(grid, WARPS * 32, shared, [&] { kernel(work); });
  return 0;
#else
  return launch_kernel(kernel, work, grid, WARPS * 32, shared, work.early, stream);
#endif
}

template <int BITS, int SHALLOW, int FAR>
static int choose(const Work& work, int kind, int shared, void* stream) {
  const bool one = work.batch == 1;
  if (kind == 0)
    return one ? launch<BITS, true, SHALLOW, 8, 3>(work, shared, stream)
               : launch<BITS, false, SHALLOW, 8, 3>(work, shared, stream);
  if (kind == 1)
    return one ? launch<BITS, true, FAR, 8, 2>(work, shared, stream) : launch<BITS, false, FAR, 8, 2>(work, shared, stream);
  return one ? launch<BITS, true, FAR, 16, 1>(work, shared, stream) : launch<BITS, false, FAR, 16, 1>(work, shared, stream);
}

// y (batch, rows) = x (batch, columns) · Wᵀ, bfloat16; batch from 1 to 8.
//   bits     16, 8 or 4
//   kind     0: 8 warps, few loads ahead; 1: 8 warps, more; 2: 16 warps, more
//   high     tiles of 16 rows in a block; divides the warps
//   parts    blocks that share the columns of a tile; sums: (parts, batch, rows) float32, arrived: (tiles,) int32 of zeros
//   resident blocks a multiprocessor, 0: one for each unit; limit: bytes of shared memory a block may have
// Returns 0; -1, -2: cannot be cut so (see `cut`), and nothing is written; 1000 and more: an error of CUDA. With y null
// it only says whether it can.
extern "C" int optimum_dsa_two_of_four(const void* weights, const void* scales, const void* x, void* y, void* sums,
                                       void* arrived, int rows, int columns, int batch, int bits, int kind, int high,
                                       int parts, int resident, int multiprocessors, int limit, int early, void* stream) {
  Work work{};
  work.weights = (const uint8_t*)weights, work.scales = (const float*)scales, work.x = (const uint16_t*)x;
  work.y = (uint16_t*)y, work.sums = (float*)sums, work.arrived = (int*)arrived;
  work.rows = rows, work.columns = columns, work.batch = batch, work.high = high, work.parts = parts;
  work.early = early;
  if (batch < 1 || batch > 8 || rows < 1 || kind < 0 || kind > 2 || high < 1) return -1;
  const int shared = cut(work, kind == 2 ? 16 : 8, resident, multiprocessors, limit);
  if (shared < 0 || !y) return shared < 0 ? shared : 0;
  if (bits == 16) return choose<16, 1, 2>(work, kind, shared, stream);
  if (bits == 8) return choose<8, 1, 3>(work, kind, shared, stream);
  if (bits == 4) return choose<4, 2, 4>(work, kind, shared, stream);
  return -1;
}
