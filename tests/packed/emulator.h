// A block of a GPU on a CPU: every thread is a fiber, and what device.cuh asks of the card is done here, with checks. So
// the source of a kernel runs as it stands; only the spelling of the instructions is not tested by it.
#pragma once
#include <csetjmp>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <ucontext.h>
#include <vector>
#define DEVICE inline
#define __global__
#define __launch_bounds__(...)

struct uint2 {
  uint32_t x, y;
};
struct uint4 {
  uint32_t x, y, z, w;
};
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
struct Index {
  int x;
};
inline Index threadIdx, blockIdx;

namespace emulator {
constexpr size_t STACK = 1 << 16;
struct Barrier {
  int members = 0, arrived = 0, turn = 0;
};
struct Copy {
  uint32_t to;
  const uint8_t* from;
};
struct Fiber {
  jmp_buf place;
  ucontext_t first;
  bool begun = false, done = false;
  std::vector<std::vector<Copy>> copies{1};  // that have not landed, by where they were ended
};
struct Warp {
  Barrier barrier;
  uint32_t words[32][9];
};
inline std::vector<uint8_t> shared;
inline std::vector<Fiber> fibers;
inline std::vector<Warp> warps;
inline Barrier block;
inline std::function<void()> body;
inline jmp_buf scheduler;
inline const uint8_t *weights_begin, *weights_end;
inline long weights_read;

inline void fail(const char* why) {
  fprintf(stderr, "emulator: %s (block %d, thread %d)\n", why, blockIdx.x, threadIdx.x);
  abort();
}
// jmp_bufs instead of swapcontext, which asks the kernel about signals each time.
inline void yield() {
  if (!_setjmp(fibers[threadIdx.x].place)) _longjmp(scheduler, 1);
}
inline void wait(Barrier& barrier) {
  const int turn = barrier.turn;
  if (++barrier.arrived == barrier.members)
    barrier.arrived = 0, barrier.turn++;
  else
    while (barrier.turn == turn) yield();
}
inline Warp& warp() { return warps[threadIdx.x / 32]; }
inline void begin() {
  body();
  fibers[threadIdx.x].done = true;
  _longjmp(scheduler, 1);
}
inline void resume(int thread) {
  Fiber& fiber = fibers[thread];
  threadIdx.x = thread;
  if (_setjmp(scheduler)) return;
  if (fiber.begun) _longjmp(fiber.place, 1);
  fiber.begun = true;
  setcontext(&fiber.first);
}
// Blocks one after the other; warps advance unevenly, and shared memory begins as NaN.
inline void run(int grid, int threads, int bytes, std::function<void()> kernel) {
  static std::vector<char> stacks;
  static uint32_t random = 1;
  body = kernel;
  stacks.resize(STACK * threads);
  for (blockIdx.x = 0; blockIdx.x < grid; blockIdx.x++) {
    shared.assign(bytes, 0xff);
    fibers.assign(threads, Fiber());
    warps.assign(threads / 32, Warp());
    for (Warp& warp : warps) warp.barrier.members = 32;
    block = {threads, 0, 0};
    for (int i = 0; i < threads; i++) {
      getcontext(&fibers[i].first);
      fibers[i].first.uc_stack = {stacks.data() + STACK * i, 0, STACK};
      makecontext(&fibers[i].first, begin, 0);
    }
    static int left;
    static long rounds;
    for (left = threads, rounds = 0; left; rounds++) {
      if (rounds > 1000000) fail("no progress");
      random = random * 1664525u + 1013904223u;
      static int i, end;
      for (i = random >> 8, end = i + threads / 32, left = 0; i < end; i++) {
        random = random * 1664525u + 1013904223u;
        static int thread, last;
        thread = i % (threads / 32) * 32;
        for (last = thread + 32; thread < last; thread++) {
          if (!fibers[thread].done && random >> 30) resume(thread);
          left += !fibers[thread].done;
        }
      }
    }
  }
}
inline void check_shared(uint32_t at, uint32_t bytes) {
  if (at % bytes || at + bytes > shared.size()) fail("access beyond shared memory, or not aligned");
}
template <class To, class From> To cast(From value) {
  static_assert(sizeof(To) == sizeof(From));
  To found;
  memcpy(&found, &value, sizeof(To));
  return found;
}
}  // namespace emulator

inline uint32_t shared_base() { return 0; }
inline void sync_block() { emulator::wait(emulator::block); }
inline void sync_warp() { emulator::wait(emulator::warp().barrier); }
inline void fence() {}
inline int add_one(int* counter) { return (*counter)++; }
inline int anew(int value) { return value; }
inline void let_the_next_begin() {}
inline void wait_for_the_one_before() {}

inline float as_float(uint32_t bits) { return emulator::cast<float>(bits); }
inline float from_bfloat16(uint16_t half) { return as_float((uint32_t)half << 16); }
inline uint16_t to_bfloat16(float value) {
  const uint32_t bits = emulator::cast<uint32_t>(value);
  if ((bits & 0x7fffffff) > 0x7f800000) return bits >> 16 | 64;
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
inline float from_float16(uint16_t half) { return emulator::cast<_Float16>(half); }
inline uint16_t to_float16(float value) {
  return emulator::cast<uint16_t>((_Float16)(value > 65504 ? 65504 : value < -65504 ? -65504 : value));
}
inline uint16_t round_float16(float value) { return emulator::cast<uint16_t>((_Float16)value); }
inline float from_neighbour(float value, int distance) {
  auto& warp = emulator::warp();
  warp.words[threadIdx.x % 32][0] = emulator::cast<uint32_t>(value);
  emulator::wait(warp.barrier);
  const uint32_t found = warp.words[threadIdx.x % 32 ^ distance][0];
  emulator::wait(warp.barrier);
  return as_float(found);
}
template <class Word> inline Word from_lane(Word value, int lane) {
  auto& warp = emulator::warp();
  warp.words[threadIdx.x % 32][0] = emulator::cast<uint32_t>(value);
  sync_warp();
  const uint32_t found = warp.words[lane % 32][0];
  sync_warp();
  return emulator::cast<Word>(found);
}
inline bool any_lane(bool value) {
  bool any = false;
  for (int lane = 0; lane < 32; lane++) any |= from_lane<uint32_t>(value, lane);
  return any;
}
inline void add_from_below(uint32_t& sum, int distance) {
  const int lane = threadIdx.x % 32;
  const uint32_t other = from_lane(sum, lane < distance ? lane : lane - distance);
  if (lane >= distance) sum += other;
}
inline float power_of_two(int power) { return as_float(127 + power << 23); }
inline int count_bits(uint32_t word) { return __builtin_popcount(word); }
inline uint32_t pick_bytes(uint32_t first, uint32_t second, uint32_t which) {
  const uint64_t all = (uint64_t)second << 32 | first;
  uint32_t found = 0;
  for (int i = 0; i < 4; i++) found |= (uint32_t)(all >> 8 * (which >> 4 * i & 7) & 255) << 8 * i;
  return found;
}
inline uint32_t shift_right(uint32_t low, uint32_t high, uint32_t bits) {
  return ((uint64_t)high << 32 | low) >> (bits & 31);
}
inline uint32_t and_or(uint32_t value, uint32_t mask, uint32_t more) { return (value & mask) | more; }
inline uint32_t add_float16_pairs(uint32_t one, uint32_t other) {
  const uint32_t high = to_float16(from_float16(one >> 16) + from_float16(other >> 16));
  return high << 16 | to_float16(from_float16(one) + from_float16(other));
}
inline uint32_t add_bfloat16_pairs(uint32_t one, uint32_t other) {
  const uint32_t high = to_bfloat16(from_bfloat16(one >> 16) + from_bfloat16(other >> 16));
  return high << 16 | to_bfloat16(from_bfloat16(one) + from_bfloat16(other));
}

// PTX ISA 9.7.14.6, sparse matrix storage and the fragments of m16n8k32, lane = 4 g + t:
//   A  registers 0, 2 of row g, 1, 3 of row g + 8; the two kept of four t (registers 0, 1), of four t + 4 (2, 3)
//   B  register i: rows 8 i + 2 t, + 1 of column g;  sums: rows g, g + 8, columns 2 t, + 1
//   places  two lanes of each four, from 2 · WHO: the first fours 0-3, the second fours 4-7, 4 bits each, ascending; of
//           row g the low 16 bits, of row g + 8 the high ones; of each four the lower place first
template <bool FLOAT16, int WHO>
inline void multiply_sparse(float (&sums)[4], const uint32_t (&a)[4], uint4 b, uint32_t places) {
  auto& warp = emulator::warp();
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const uint32_t mine[9] = {a[0], a[1], a[2], a[3], b.x, b.y, b.z, b.w, places};
  memcpy(warp.words[lane], mine, sizeof(mine));
  emulator::wait(warp.barrier);
  auto number = [](uint32_t pair, int high) { return FLOAT16 ? from_float16(pair >> 16 * high) : from_bfloat16(pair >> 16 * high); };
  for (int i = 0; i < 4; i++) {
    const int low = i / 2, column = 2 * t + i % 2;
    double sum = 0;
    for (int four = 0; four < 8; four++) {
      const uint32_t two = warp.words[4 * g + 2 * WHO + four / 4][8] >> (16 * low + 4 * (four % 4)) & 15;
      const int place[2] = {(int)two & 3, (int)two >> 2};
      if (place[0] >= place[1]) emulator::fail("the places of a four are not in order");
      for (int high = 0; high < 2; high++) {
        const int row = 4 * four + place[high];
        sum += (double)number(warp.words[4 * g + four % 4][low + 2 * (four / 4)], high) *
               number(warp.words[4 * column + row % 8 / 2][4 + row / 8], row % 2);
      }
    }
    sums[i] += (float)sum;
  }
  emulator::wait(warp.barrier);
}

// The fragments of m16n8k16:
//   A  registers 0, 2 of row g, 1, 3 of row g + 8; columns 2 t, + 1 (registers 0, 1), and those 8 on (2, 3)
//   B  register i: rows 8 i + 2 t, + 1 of column g;  sums: rows g, g + 8, columns 2 t, + 1
template <bool FLOAT16> inline void multiply_dense(float (&sums)[4], const uint32_t (&a)[4], uint2 b) {
  auto& warp = emulator::warp();
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const uint32_t mine[6] = {a[0], a[1], a[2], a[3], b.x, b.y};
  memcpy(warp.words[lane], mine, sizeof(mine));
  sync_warp();
  auto number = [](uint32_t pair, int high) { return FLOAT16 ? from_float16(pair >> 16 * high) : from_bfloat16(pair >> 16 * high); };
  for (int i = 0; i < 4; i++) {
    double sum = 0;
    for (int k = 0; k < 16; k++)
      sum += (double)number(warp.words[4 * g + k % 8 / 2][i / 2 + 2 * (k / 8)], k % 2) *
             number(warp.words[4 * (2 * t + i % 2) + k % 8 / 2][4 + k / 8], k % 2);
    sums[i] += (float)sum;
  }
  sync_warp();
}

namespace emulator {
inline void check_read(const void* from, size_t bytes) {
  if ((uintptr_t)from % bytes) fail("weights are not aligned");
  // What is aligned stays on the page of a byte that may be read.
  const bool beyond = (uint8_t*)from + bytes <= weights_begin || (uint8_t*)from >= weights_end;
  if (weights_end && beyond) fail("read beyond the weights");
  weights_read += bytes;
}
}  // namespace emulator
inline void load_word(uint32_t& found, const uint32_t* from, bool wanted) {
  found = 0;
  if (!wanted) return;
  emulator::check_read(from, 4);
  memcpy(&found, from, 4);
}
// They land as late as they may, and until then there are NaNs.
inline void copy_later(uint32_t to, const uint8_t* from) {
  emulator::check_read(from, 16);
  emulator::check_shared(to, 16);
  memset(emulator::shared.data() + to, 0xff, 16);
  emulator::fibers[threadIdx.x].copies.back().push_back({to, from});
}
inline void end_of_copies() { emulator::fibers[threadIdx.x].copies.emplace_back(); }
template <int MAY_MISS> inline void wait_for_copies() {
  auto& copies = emulator::fibers[threadIdx.x].copies;
  while (copies.size() > MAY_MISS + 1) {
    for (const auto& copy : copies.front()) memcpy(emulator::shared.data() + copy.to, copy.from, 16);
    copies.erase(copies.begin());
  }
}

template <class Words> inline void load_weights(Words& found, const uint8_t* from, bool wanted) {
  if (!wanted) return;
  const size_t bytes = sizeof(Words);
  const bool beyond = from < emulator::weights_begin || from + bytes > emulator::weights_end;
  if (emulator::weights_end && beyond) emulator::fail("read beyond the weights");
  if ((uintptr_t)from % bytes) emulator::fail("weights are not aligned");
  memcpy(&found, from, bytes);
  // The four lanes of a row read the same scales.
  emulator::weights_read += bytes == 16 ? 16 : threadIdx.x % 4 ? 0 : 8;
}
inline uint4 load_input(const void* from) {
  if ((uintptr_t)from % 16) emulator::fail("the input is not aligned");
  uint4 found;
  memcpy(&found, from, 16);
  return found;
}
inline float load_part(const float* from) { return *from; }
inline void store_part(float* to, float value) { *to = value; }
inline uint4 load_shared(uint32_t from) {
  emulator::check_shared(from, 16);
  uint4 found;
  memcpy(&found, emulator::shared.data() + from, 16);
  return found;
}
inline uint32_t load_shared_word(uint32_t from) {
  emulator::check_shared(from, 4);
  uint32_t found;
  memcpy(&found, emulator::shared.data() + from, 4);
  return found;
}
inline uint2 load_shared_pair(uint32_t from) {
  emulator::check_shared(from, 8);
  uint2 found;
  memcpy(&found, emulator::shared.data() + from, 8);
  return found;
}
inline void store_shared(uint32_t to, uint4 value) {
  emulator::check_shared(to, 16);
  memcpy(emulator::shared.data() + to, &value, 16);
}
inline void store_shared_word(uint32_t to, uint32_t value) {
  emulator::check_shared(to, 4);
  memcpy(emulator::shared.data() + to, &value, 4);
}
inline float load_shared_float(uint32_t from) { return as_float(load_shared_word(from)); }
inline void store_shared_float(uint32_t to, float value) { store_shared_word(to, emulator::cast<uint32_t>(value)); }

// Between them, unless null, every read of weights has to lie; and how many bytes were read since the last call.
extern "C" __attribute__((used)) inline long optimum_dsa_emulated(const void* begin, const void* end) {
  const long before = emulator::weights_read;
  emulator::weights_begin = (const uint8_t*)begin, emulator::weights_end = (const uint8_t*)end;
  emulator::weights_read = 0;
  return before;
}
