// What the kernels ask of the card, one function an instruction, so that a test can put its own beside them
// (EMULATED: `emulator.h` of the tests runs the kernels, as they stand, on a CPU).
#pragma once
#ifdef EMULATED
#include "emulator.h"
#else
#include <cstdint>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#define DEVICE __device__ __forceinline__

extern __shared__ __align__(128) uint8_t SHARED[];

DEVICE uint32_t shared_base() { return (uint32_t)__cvta_generic_to_shared(SHARED); }
DEVICE void sync_block() { __syncthreads(); }
DEVICE void sync_warp() { __syncwarp(); }
DEVICE void fence() { __threadfence(); }
DEVICE int add_one(int* counter) { return atomicAdd(counter, 1); }
DEVICE float from_neighbour(float value, int distance) { return __shfl_xor_sync(~0u, value, distance); }
template <class Word> DEVICE Word from_lane(Word value, int lane) { return __shfl_sync(~0u, value, lane); }
DEVICE bool any_lane(bool value) { return __any_sync(~0u, value); }
// sum += that of the lane `distance` below, where there is one.
DEVICE void add_from_below(uint32_t& sum, int distance) {
  asm volatile(
      "{\n.reg .pred p;\n.reg .u32 other;\nshfl.sync.up.b32 other|p, %0, %1, 0, 0xffffffff;\n"
      "@p add.u32 %0, %0, other;\n}"
      : "+r"(sum)
      : "r"(distance));
}

// A number that the compiler has to compute again here: what follows from it is not held in registers through a loop.
DEVICE int anew(int value) {
  asm volatile("" : "+r"(value));
  return value;
}

DEVICE float from_bfloat16(uint16_t half) { return __uint_as_float((uint32_t)half << 16); }
DEVICE uint16_t to_bfloat16(float value) { return __bfloat16_as_ushort(__float2bfloat16_rn(value)); }
// Numbers beyond what float16 holds become the greatest that it does.
DEVICE uint16_t to_float16(float value) {
  return __half_as_ushort(__float2half_rn(fminf(fmaxf(value, -65504.f), 65504.f)));
}
DEVICE uint16_t round_float16(float value) { return __half_as_ushort(__float2half_rn(value)); }
DEVICE float power_of_two(int power) { return __int_as_float(127 + power << 23); }

DEVICE int count_bits(uint32_t word) { return __popc(word); }

// Four of the eight bytes of `second:first`, by four numbers of 4 bits.
DEVICE uint32_t pick_bytes(uint32_t first, uint32_t second, uint32_t which) {
  uint32_t found;
  asm("prmt.b32 %0,%1,%2,%3;" : "=r"(found) : "r"(first), "r"(second), "r"(which));
  return found;
}
// The lower half of `high:low` >> bits, of which the last five count.
DEVICE uint32_t shift_right(uint32_t low, uint32_t high, uint32_t bits) { return __funnelshift_r(low, high, bits); }
DEVICE uint32_t and_or(uint32_t value, uint32_t mask, uint32_t more) {
  uint32_t found;
  asm("lop3.b32 %0,%1,%2,%3,0xea;" : "=r"(found) : "r"(value), "r"(mask), "r"(more));
  return found;
}
DEVICE uint32_t add_float16_pairs(uint32_t one, uint32_t other) {
  uint32_t sum;
  asm("add.rn.f16x2 %0,%1,%2;" : "=r"(sum) : "r"(one), "r"(other));
  return sum;
}
DEVICE uint32_t add_bfloat16_pairs(uint32_t one, uint32_t other) {
  // sm_80 has no addition of pairs: one times 1.0 plus the other, in one instruction.
  uint32_t sum;
  asm("fma.rn.bf16x2 %0,%1,%2,%3;" : "=r"(sum) : "r"(one), "r"(0x3f803f80u), "r"(other));
  return sum;
}

// sums (16 x 8) += A (16 x 32, two of four kept) · B (32 x 8); `places` says where the kept ones stand, and WHO which
// two of each four lanes hold them. PTX ISA 9.7.14.6: sparse mma, m16n8k32.
template <bool FLOAT16, int WHO>
DEVICE void multiply_sparse(float (&sums)[4], const uint32_t (&a)[4], uint4 b, uint32_t places) {
#define MMA_SP(TYPE)                                                                                     \
  asm("mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32." TYPE "." TYPE                        \
      ".f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9,%10,%11},{%0,%1,%2,%3},%12,%13;"                          \
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])                                       \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b.x), "r"(b.y), "r"(b.z), "r"(b.w), "r"(places), \
        "n"(WHO))
  if (FLOAT16)
    MMA_SP("f16");
  else
    MMA_SP("bf16");
#undef MMA_SP
}

// sums (16 x 8) += A (16 x 16) · B (16 x 8). PTX ISA 9.7.14.5: mma, m16n8k16.
template <bool FLOAT16> DEVICE void multiply_dense(float (&sums)[4], const uint32_t (&a)[4], uint2 b) {
#define MMA(TYPE)                                                                                     \
  asm("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE                                          \
      ".f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"                                       \
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])                                    \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b.x), "r"(b.y))
  if (FLOAT16)
    MMA("f16");
  else
    MMA("bf16");
#undef MMA
}

// Weights are read once, so they leave no trace in the first cache.
DEVICE void load_weights(uint4& found, const uint8_t* from, bool wanted) {
  asm volatile(
      "{\n.reg .pred q;\nsetp.ne.b32 q, %5, 0;\n"
      "@q ld.global.nc.L1::no_allocate.L2::256B.v4.u32 {%0,%1,%2,%3}, [%4];\n}"
      : "+r"(found.x), "+r"(found.y), "+r"(found.z), "+r"(found.w)
      : "l"(from), "r"((int)wanted));
}
DEVICE void load_weights(uint2& found, const uint8_t* from, bool wanted) {
  asm volatile(
      "{\n.reg .pred q;\nsetp.ne.b32 q, %3, 0;\n@q ld.global.nc.L1::no_allocate.v2.u32 {%0,%1}, [%2];\n}"
      : "+r"(found.x), "+r"(found.y)
      : "l"(from), "r"((int)wanted));
}
// 0 where it is not wanted.
DEVICE void load_word(uint32_t& found, const uint32_t* from, bool wanted) {
  found = 0;
  asm volatile("{\n.reg .pred q;\nsetp.ne.b32 q, %2, 0;\n@q ld.global.nc.u32 %0, [%1];\n}"
               : "+r"(found)
               : "l"(from), "r"((int)wanted));
}
// 16 bytes to shared memory while the thread goes on. It waits for all that it has asked for but what came after the
// last MAY_MISS ends.
DEVICE void copy_later(uint32_t to, const uint8_t* from) {
  asm volatile("cp.async.cg.shared.global.L2::256B [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}
DEVICE void end_of_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int MAY_MISS> DEVICE void wait_for_copies() { asm volatile("cp.async.wait_group %0;" ::"n"(MAY_MISS) : "memory"); }
DEVICE uint4 load_input(const void* from) {
  uint4 found;
  asm volatile("ld.global.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(found.x), "=r"(found.y), "=r"(found.z), "=r"(found.w)
               : "l"(from)
               : "memory");
  return found;
}
// Past the first cache, which other multiprocessors do not see.
DEVICE float load_part(const float* from) { return __ldcg(from); }
DEVICE void store_part(float* to, float value) { __stcg(to, value); }

DEVICE uint4 load_shared(uint32_t from) {
  uint4 found;
  asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(found.x), "=r"(found.y), "=r"(found.z), "=r"(found.w)
               : "r"(from)
               : "memory");
  return found;
}
DEVICE uint32_t load_shared_word(uint32_t from) {
  uint32_t found;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(found) : "r"(from) : "memory");
  return found;
}
DEVICE uint2 load_shared_pair(uint32_t from) {
  uint2 found;
  asm volatile("ld.shared.v2.u32 {%0,%1}, [%2];" : "=r"(found.x), "=r"(found.y) : "r"(from) : "memory");
  return found;
}
DEVICE void store_shared_word(uint32_t to, uint32_t value) {
  asm volatile("st.shared.u32 [%0], %1;" ::"r"(to), "r"(value) : "memory");
}
DEVICE void store_shared(uint32_t to, uint4 value) {
  asm volatile("st.shared.v4.u32 [%0], {%1,%2,%3,%4};" ::"r"(to), "r"(value.x), "r"(value.y), "r"(value.z),
               "r"(value.w)
               : "memory");
}
DEVICE float load_shared_float(uint32_t from) { return __uint_as_float(load_shared_word(from)); }
DEVICE void store_shared_float(uint32_t to, float value) { store_shared_word(to, __float_as_uint(value)); }

// A kernel may begin while the one before it ends (sm_90): what that one wrote is read after `wait_for_the_one_before`.
DEVICE void let_the_next_begin() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
DEVICE void wait_for_the_one_before() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// 0, or 1000 and an error of CUDA.
template <class Work>
int launch_kernel(void (*kernel)(Work), const Work& work, int blocks, int threads, int shared, bool early, void* stream) {
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
  if (error) return 1000 + error;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(blocks), config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared, config.stream = (cudaStream_t)stream;
  cudaLaunchAttribute begins_early[1];
  begins_early[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  begins_early[0].val.programmaticStreamSerializationAllowed = 1;
  config.attrs = begins_early, config.numAttrs = early ? 1 : 0;
  error = cudaLaunchKernelEx(&config, kernel, work);
  if (error) cudaGetLastError();  // forgotten here, as it is told to the caller
  return error ? 1000 + error : 0;
}
#endif
