// y = x · Wᵀ for W as a mask and the values that it keeps, and one row of x: values are put into their places on the way
// to the tensor core, so that only they and the mask are read.
//
// A warp takes two rows after two rows, and of both 1024 columns at a time ("a step"). Each lane counts the ones in a word
// of either mask, and a sum over the lanes tells for every 16 columns ("a slice") with which value they begin: an entry is
// the 16 bits of the mask below that number. Then a lane owns four columns of either row: its values are neighbours in
// shared memory, and are spread by a table of the 16 ways in which four bits can be set. So they are A of an mma.m16n8k16
// of which rows g and g + 8 are slice g of the two rows of W, while column n of B is slice n of x: the sums wanted are the
// diagonal of the product. What else it computes costs nothing, as the lanes' own work is what takes the time.
//
// Values come through a ring of four slots for each row, which are fetched again as soon as they are used, across rows:
// every row begins in a new slot. Warps wait for nobody but themselves.
#include "device.cuh"

struct Masked {
  const uint32_t* mask;     // the first row begins `bit` bits on
  const uint8_t* values;
  const long long* starts;  // (rows + 1,), in values
  const float* scales;      // (rows, scale_columns), of whole numbers
  const uint16_t* x;
  uint16_t* y;
  int rows, columns, bit;
  int scale_columns, group_shift;  // columns that share a scale, 1 << group_shift
  int pairs, steps;                // of rows; of a row
  int warps, blocks, stride;       // of a block; of the grid; from one pair of a warp to its next
  int at_warps;                    // where shared memory holds what each warp has for itself, after x
  bool float16, early;             // whether x and y are float16
};
constexpr int STEP = 1024, HALF_STEP = STEP / 2;  // columns; x is there for whole halves of a step
constexpr uint32_t SLOT = 1024, SLOTS = 4, RING = SLOT * SLOTS;
constexpr uint32_t PITCH = RING + 16;  // the first 16 bytes are there again behind the last ones
constexpr uint32_t OF_WARP = 2 * PITCH + STEP / 16 * 8;  // two rings, and the entries of a step
constexpr uint32_t AT_TABLE = 0, AT_LARGEST = 128, AT_X_MASKED = 256;

// How four columns are spread of which those in `four` are kept. 16 bits: x chooses bytes of the first two values, or
// zeros, y of the four values, with a fourth that is made zero unless its upper half is all ones. Of whole numbers x
// chooses among four bytes and a fifth that is zero.
template <int BITS> DEVICE uint2 spreading(int four) {
  int kept = 0;
  uint2 found = make_uint2(0, four == 15 ? 0xffff0000u : 0);
  for (int i = 0; i < 4; i++) {
    const bool keeps = four >> i & 1;
    if (BITS == 16) {
      const uint32_t low = 2 * (keeps ? kept : i < 2 ? 2 : 3), bytes = low | low + 1 << 4;
      (i < 2 ? found.x : found.y) |= bytes << 8 * (i & 1);
    } else {
      found.x |= (keeps ? kept : 4) << 4 * i;
    }
    kept += keeps;
  }
  return found;
}

// A lane's four columns of a row, as two pairs of what the tensor core multiplies. `up`: what the lane's four bits are
// brought to the top of a word with, as a multiplication is done beside all the shifts here, and one more shift is not.
template <int BITS>
DEVICE void expand_masked(uint32_t entry, uint32_t up, uint32_t ring, uint32_t table, uint32_t& low, uint32_t& high) {
  const uint32_t mine = entry * up, four = mine >> 28, at = (entry >> 16) + count_bits(mine & 0x0fffffff);
  if (BITS == 16) {
    const uint32_t from = ring + 2 * (at & (RING / 2 - 2));
    const uint32_t w0 = load_shared_word(from), w1 = load_shared_word(from + 4), w2 = load_shared_word(from + 8);
    const uint32_t first = shift_right(w0, w1, at << 4), second = shift_right(w1, w2, at << 4);
    const uint2 how = load_shared_pair(table + 8 * four);
    low = pick_bytes(first, 0, how.x);
    high = pick_bytes(first, second & (how.y | 0xffff), how.y);
    return;
  }
  uint32_t bytes;
  const uint32_t how = load_shared_word(table + 8 * four);
  if (BITS == 8) {
    const uint32_t from = ring + (at & (RING - 4));
    const uint32_t some = shift_right(load_shared_word(from), load_shared_word(from + 4), at << 3);
    bytes = pick_bytes(some, 0, how) ^ 0x80808080u;
  } else {
    const uint32_t from = ring + (at >> 1 & (RING - 4));
    uint32_t some = pick_bytes(shift_right(load_shared_word(from), load_shared_word(from + 4), at << 2), 0, 0x4140);
    some = (some | some << 4) & 0x0f0f0f0fu;
    bytes = pick_bytes(some, 0, how) ^ 0x08080808u;
  }
  // As in two_of_four.cu: 1024 + byte - (1024 + 128), float16, or of 4 bits 8.
  const uint32_t less = BITS == 8 ? 0xe480e480u : 0xe408e408u;
  low = add_float16_pairs(pick_bytes(bytes, 0x64646464u, 0x4140), less);
  high = add_float16_pairs(pick_bytes(bytes, 0x64646464u, 0x4342), less);
}

// x into shared memory, with zeros behind it. Where whole numbers meet bfloat16, it becomes float16, times a power of two
// that brings the largest to 2^12: so nothing is too large, and nothing that counts too small. Returns what sums are to be
// multiplied with.
template <int BITS> DEVICE float stage_masked(const Masked& work, uint32_t shared) {
  const int threads = 32 * work.warps, lane = threadIdx.x & 31;
  const int eights = (work.columns + HALF_STEP - 1) / HALF_STEP * (HALF_STEP / 8);
  uint32_t largest = 0;
  for (int i = threadIdx.x; i < eights; i += threads) {
    uint32_t pairs[4] = {0, 0, 0, 0};
    if (8 * i + 8 <= work.columns) {
      const uint4 found = load_input(work.x + 8 * i);
      pairs[0] = found.x, pairs[1] = found.y, pairs[2] = found.z, pairs[3] = found.w;
    } else {
      for (int k = 0; k < 8; k++)
        if (8 * i + k < work.columns) pairs[k / 2] |= (uint32_t)work.x[8 * i + k] << 16 * (k & 1);
    }
    for (int k = 0; k < 8; k++) {
      const uint32_t size = pairs[k / 2] >> 16 * (k & 1) & 0x7fff;
      largest = size > largest ? size : largest;
    }
    store_shared(shared + AT_X_MASKED + 16 * i, make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]));
  }
  if (BITS == 16 || work.float16) return 1;
  for (int distance = 1; distance < 32; distance *= 2) {
    const uint32_t other = from_lane(largest, lane ^ distance);
    largest = other > largest ? other : largest;
  }
  if (lane == 0) store_shared_word(shared + AT_LARGEST + 4 * (threadIdx.x >> 5), largest);
  sync_block();
  for (int warp = 0; warp < work.warps; warp++) {
    const uint32_t other = load_shared_word(shared + AT_LARGEST + 4 * warp);
    largest = other > largest ? other : largest;
  }
  const int exponent = largest >> 7, power = exponent < 13 ? 126 : 139 - exponent;  // 2^126 is the most with an inverse
  const float factor = power_of_two(power);
  for (int i = threadIdx.x; i < eights; i += threads) {
    const uint4 found = load_shared(shared + AT_X_MASKED + 16 * i);
    uint32_t pairs[4] = {found.x, found.y, found.z, found.w};
    for (int k = 0; k < 4; k++)
      pairs[k] = round_float16(from_bfloat16(pairs[k]) * factor) |
                 (uint32_t)round_float16(from_bfloat16(pairs[k] >> 16) * factor) << 16;
    store_shared(shared + AT_X_MASKED + 16 * i, make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]));
  }
  return power_of_two(-power);
}

// Where the values of a row lie: whole pieces of 16 bytes from the one with its first value on.
struct Ends {
  long long begin, end;
};
struct Stream {
  const uint8_t* from;
  int bytes;       // from there to the row's end
  uint32_t first;  // values from there to its own

  DEVICE uint32_t slots() const { return bytes > (int)SLOT ? (bytes + SLOT - 1) / SLOT : 1; }
};
template <int BITS> DEVICE Stream stream_of(const Masked& work, Ends ends) {
  const uint8_t* at = work.values + ends.begin * BITS / 8;
  const int before = (int)((uintptr_t)at & 15);
  const int bytes = (int)((ends.end - ends.begin) * BITS / 8);
  return Stream{at - before, bytes ? before + bytes : 0, (uint32_t)before * 8 / BITS};
}
// Of the row that half of the lanes look after; the others look after the other row of the pair.
DEVICE Ends ends_of(const Masked& work, int pair) {
  const int row = 2 * pair + (threadIdx.x >> 4 & 1);
  return row < work.rows ? Ends{work.starts[row], work.starts[row + 1]} : Ends{0, 0};
}

// Values on their way: one row of each of a warp's pairs after the other, in slots that are counted from the first one on.
template <int BITS> struct Ring {
  const Masked& work;
  const int skip = 16 * (threadIdx.x & 15);  // bytes from a slot's begin to what the lane copies first
  const uint32_t at;
  int pair;
  const uint8_t* coming;
  int left;  // bytes that are coming of the row
  Ends then;
  uint32_t filled = 0, landed = 0, landed_before = 0;  // slots: asked for, and before the last and the last two askings

  DEVICE Ring(const Masked& work, uint32_t at, int pair) : work(work), at(at), pair(pair) { begin(ends_of(work, pair)); }
  DEVICE void begin(Ends ends) {
    const Stream stream = stream_of<BITS>(work, ends);
    coming = stream.from + skip, left = stream.bytes - skip;
    then = ends_of(work, pair + work.stride);
  }
  // Ask for all slots before `limit`.
  DEVICE void fill(uint32_t limit) {
    landed_before = landed, landed = filled;
    while (filled < limit && pair < work.pairs) {
      const uint32_t to = at + filled % SLOTS * SLOT + skip;
#pragma unroll
      for (int bytes = 0; bytes < (int)SLOT; bytes += 256)
        if (bytes < left) copy_later(to + bytes, coming + bytes);
      if (to == at && left > 0) copy_later(to + RING, coming);
      filled++, coming += SLOT, left -= SLOT;
      if (left + skip <= 0) pair += work.stride, begin(then);
    }
    end_of_copies();
  }
  // Until all slots before `needed`, which each lane says of its row, are there.
  DEVICE void wait(uint32_t needed) const {
    if (!any_lane(needed > landed_before))
      wait_for_copies<2>();
    else if (!any_lane(needed > landed))
      wait_for_copies<1>();
    else
      wait_for_copies<0>();
  }
};

// What a step needs of the masks and the scales of two rows: of each mask the words that the lane's 32 bits are in. Where
// all rows begin at whole words (WHOLE), these are one.
struct Words {
  uint32_t low[2], high[2];
  float scales[2];
};
template <bool WHOLE, bool GROUPS> DEVICE Words read_words(const Masked& work, int pair, int step) {
  Words found = {};
  const int column = STEP * step + 32 * (threadIdx.x & 31), left = work.columns - column;
#pragma unroll
  for (int k = 0; k < 2; k++) {
    const int row = 2 * pair + k;
    const bool wanted = left > 0 && row < work.rows;
    if (WHOLE) {
      load_word(found.low[k], work.mask + (row * (work.columns / 32) + column / 32), wanted);
    } else {
      const long long at = (long long)row * work.columns + column + work.bit;
      load_word(found.low[k], work.mask + (at >> 5), wanted);
      load_word(found.high[k], work.mask + (at >> 5) + 1, wanted && (int)(at & 31) + (left < 32 ? left : 32) > 32);
    }
    if (GROUPS && wanted)
      found.scales[k] = work.scales[(size_t)row * work.scale_columns + (column >> work.group_shift)];
  }
  return found;
}
template <bool WHOLE> DEVICE uint32_t mask_of(const Masked& work, const Words& words, int k, int pair, int step) {
  if (WHOLE) return words.low[k];
  const uint32_t shift = work.bit + (uint32_t)(2 * pair + k) * work.columns;  // the same for all words of a row
  const int left = work.columns - STEP * step - 32 * (int)(threadIdx.x & 31);
  const uint32_t found = shift_right(words.low[k], words.high[k], shift);
  return left >= 32 ? found : left > 0 ? found & (1u << left) - 1 : 0;
}

// The entries of a step into shared memory, from each lane's words of the masks, and where the rows' next values are, `at`
// of lanes 0 and 16. Returns how many values of the lane's row there are.
DEVICE uint32_t enter(uint32_t entries, uint32_t m0, uint32_t m1, uint32_t at) {
  const int lane = threadIdx.x & 31;
  const uint32_t ones = count_bits(m0) + 65536u * count_bits(m1);
  uint32_t before = ones;
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) add_from_below(before, distance);
  const uint32_t both = from_lane(before, 31);
  before -= ones;
  const uint32_t begin0 = from_lane(at, 0) + (before & 0xffff), begin1 = from_lane(at, 16) + (before >> 16);
  const uint32_t middle0 = begin0 + count_bits(m0 & 0xffff), middle1 = begin1 + count_bits(m1 & 0xffff);
  store_shared(entries + 16 * lane,
               make_uint4(pick_bytes(m0, begin0, 0x5410), pick_bytes(m1, begin1, 0x5410),
                          pick_bytes(m0, middle0, 0x5432), pick_bytes(m1, middle1, 0x5432)));
  return lane < 16 ? both & 0xffff : both >> 16;
}

// Eight slices of two rows times those of x. `scales`: of the lane's 32 columns of either row.
template <int BITS, bool FLOAT16, bool GROUPS>
DEVICE void multiply_slices(float (&sums)[4], float (&total)[2], uint2 entry, uint2 x, uint32_t up, uint32_t rings,
                            uint32_t table, const float (&scales)[2], int chunk) {
  const int g = threadIdx.x >> 2 & 7;
  uint32_t a[4];
  expand_masked<BITS>(entry.x, up, rings, table, a[0], a[2]);
  expand_masked<BITS>(entry.y, up, rings + PITCH, table, a[1], a[3]);
  if (GROUPS)
    for (int k = 0; k < 4; k++) sums[k] = 0;
  multiply_dense<FLOAT16>(sums, a, x);
  if (GROUPS)
    for (int k = 0; k < 2; k++)
      total[k] += from_lane(scales[k], 4 * chunk + g / 2) * (g & 1 ? sums[2 * k + 1] : sums[2 * k]);
}

// The sums on the diagonal, all added up, are the products of two rows.
template <int BITS, bool GROUPS>
DEVICE void finish_masked(const Masked& work, const float (&sums)[4], float (&total)[2], int pair, float factor) {
  const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3, row = 2 * pair + lane;
#pragma unroll
  for (int k = 0; k < 2; k++) {
    if (!GROUPS) total[k] = g & 1 ? sums[2 * k + 1] : sums[2 * k];
    if (t != g / 2) total[k] = 0;
    for (int distance = 1; distance < 32; distance *= 2) total[k] += from_neighbour(total[k], distance);
  }
  if (lane >= 2 || row >= work.rows) return;
  float sum = (lane ? total[1] : total[0]) * factor;
  if (BITS != 16 && !GROUPS) sum *= work.scales[row];
  work.y[row] = work.float16 ? round_float16(sum) : to_bfloat16(sum);
}

template <int BITS, bool FLOAT16, bool GROUPS, bool WHOLE>
__global__ void __launch_bounds__(512, 1) masked(const Masked work) {
  constexpr uint32_t PER_SLOT = SLOT * 8 / BITS;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
  const uint32_t shared = shared_base(), table = shared + AT_TABLE;
  const uint32_t rings = shared + work.at_warps + warp * OF_WARP, entries = rings + 2 * PITCH;
  // The last turn of the warps, which has not enough for all, is shared out among all blocks.
  const int first = warp * work.blocks + blockIdx.x;
  if (work.early) let_the_next_begin();

  Ring<BITS> ring(work, rings + (lane >> 4) * PITCH, first);
  ring.fill(SLOTS);
  Stream row = stream_of<BITS>(work, ends_of(work, first));
  Ends after = ends_of(work, first + work.stride);
  Words words = read_words<WHOLE, GROUPS>(work, first, 0);
  if (threadIdx.x < 16) {
    const uint2 how = spreading<BITS>(threadIdx.x);
    store_shared_word(table + 8 * threadIdx.x, how.x);
    store_shared_word(table + 8 * threadIdx.x + 4, how.y);
  }
  if (work.early) wait_for_the_one_before();
  const float factor = stage_masked<BITS>(work, shared);
  sync_block();

  const uint32_t up = anew(1 << 28 - 4 * t);
  uint32_t slot = 0, at = row.first;  // where the row begins, and its next value, counted in the ring from the first slot on
  for (int pair = first; pair < work.pairs; pair += work.stride) {
    float sums[4] = {}, total[2] = {};
    for (int step = 0; step < work.steps; step++) {
      const bool ends = step + 1 == work.steps;
      const uint32_t m0 = mask_of<WHOLE>(work, words, 0, pair, step), m1 = mask_of<WHOLE>(work, words, 1, pair, step);
      const float scales[2] = {words.scales[0], words.scales[1]};
      words = read_words<WHOLE, GROUPS>(work, ends ? pair + work.stride : pair, ends ? 0 : step + 1);
      const uint32_t taken = enter(entries, m0, m1, at);
      ring.wait(taken ? (at + taken - 1) / PER_SLOT + 1 : 0);
      sync_warp();
      const uint32_t x = shared + AT_X_MASKED + 2 * STEP * step + 8 * lane;
#pragma unroll
      for (int half = 0; half < 2; half++) {
        if (half && work.columns - STEP * step <= HALF_STEP) break;
#pragma unroll
        for (int chunk = 4 * half, i = 0; i < 4; i++, chunk++)
          multiply_slices<BITS, FLOAT16, GROUPS>(sums, total, load_shared_pair(entries + 8 * g + 64 * chunk),
                                                 load_shared_pair(x + 256 * chunk), up, rings, table, scales, chunk);
      }
      sync_warp();  // the slots and the entries are free
      at += taken;
      if (ends) {
        slot += row.slots();
        row = stream_of<BITS>(work, after);
        after = ends_of(work, pair + 2 * work.stride);
        at = slot * PER_SLOT + row.first;
      }
      ring.fill(at / PER_SLOT + SLOTS);
    }
    finish_masked<BITS, GROUPS>(work, sums, total, pair, factor);
  }
}

// How the work is cut into blocks: bytes of shared memory of a block; -1 where it cannot be cut so, -2 where x does not fit.
static int cut_masked(Masked& work, int resident, int multiprocessors, int limit) {
  work.pairs = (work.rows + 1) / 2;
  work.steps = (work.columns + STEP - 1) / STEP;
  const int most = resident * multiprocessors, needed = (work.pairs + work.warps - 1) / work.warps;
  work.blocks = needed < most ? needed : most;
  work.stride = work.warps * work.blocks;
  const long long turns = (work.pairs + (long long)work.stride - 1) / work.stride;
  // Places in the stream of a warp are 32 bits, and so are those of words in the mask.
  if ((2LL * work.columns + 2 * SLOT) * turns >= 1LL << 30 || (long long)work.rows * work.columns >= 1LL << 36) return -1;
  work.at_warps = AT_X_MASKED + (work.columns + HALF_STEP - 1) / HALF_STEP * HALF_STEP * 2;
  const long long total = work.at_warps + (long long)work.warps * OF_WARP;
  return total > limit ? -2 : (int)total;
}

template <int BITS, bool FLOAT16, bool GROUPS> static int launch_masked(const Masked& work, int shared, void* stream) {
  const bool whole = work.columns % 32 == 0 && work.bit == 0;
  const auto kernel = whole ? masked<BITS, FLOAT16, GROUPS, true> : masked<BITS, FLOAT16, GROUPS, false>;
#ifdef EMULATED
  emulator::run(work.blocks, work.warps * 32, shared, [&] { kernel(work); });
  return 0;
#else
  return launch_kernel(kernel, work, work.blocks, work.warps * 32, shared, work.early, stream);
#endif
}

// y (rows,) = x (columns,) · Wᵀ, of one row of x; x and y bfloat16, or float16 where `float16`.
//   mask, starts, scales   as packed/ops.py has them; group: columns that share a scale, 0 (a row) or a power of two from 32
//   bits                   16: values of the type of x; 8 or 4: whole numbers
//   warps                  of a block, up to 16; resident: blocks a multiprocessor; limit: bytes of shared memory of a block
// Returns 0; -1, -2: cannot be cut so (see `cut_masked`), and nothing is written; 1000 and more: an error of CUDA. With y
// null it only says whether it can.
extern "C" int optimum_dsa_masked(const void* mask, const void* values, const void* starts, const void* scales,
                                  const void* x, void* y, int rows, int columns, int bits, int float16, int scale_columns,
                                  int group, int warps, int resident, int multiprocessors, int limit, int early,
                                  void* stream) {
  Masked work{};
  work.mask = (const uint32_t*)((uintptr_t)mask & ~(uintptr_t)3), work.bit = 8 * (int)((uintptr_t)mask & 3);
  work.values = (const uint8_t*)values, work.starts = (const long long*)starts, work.scales = (const float*)scales;
  work.x = (const uint16_t*)x, work.y = (uint16_t*)y;
  work.rows = rows, work.columns = columns, work.scale_columns = scale_columns;
  work.warps = warps, work.float16 = float16, work.early = early;
  if (rows < 1 || columns < 1 || warps < 1 || warps > 16 || resident < 1 || (group & group - 1) || (group && group < 32))
    return -1;
  while (1 << work.group_shift < group) work.group_shift++;
  const int shared = cut_masked(work, resident, multiprocessors, limit);
  if (shared < 0 || !y) return shared < 0 ? shared : 0;
  if (bits == 16)
    return float16 ? launch_masked<16, true, false>(work, shared, stream)
                   : launch_masked<16, false, false>(work, shared, stream);
  if (bits == 8)
    return group ? launch_masked<8, true, true>(work, shared, stream) : launch_masked<8, true, false>(work, shared, stream);
  if (bits == 4)
    return group ? launch_masked<4, true, true>(work, shared, stream) : launch_masked<4, true, false>(work, shared, stream);
  return -1;
}
