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
DEVICE void fence() { __threadfence(); }
DEVICE int add_one(int* counter) { return atomicAdd(counter, 1); }
DEVICE float from_neighbour(float value, int distance) { return __shfl_xor_sync(~0u, value, distance); }

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

DEVICE int count_bits(uint32_t word) { return __popc(word); }

// Four of the eight bytes of `second:first`, by four numbers of 4 bits.
DEVICE uint32_t pick_bytes(uint32_t first, uint32_t second, uint32_t which) {
  uint32_t found;
  asm("prmt.b32 %0,%1,%2,%3;" : "=r"(found) : "r"(first), "r"(second), "r"(which));
  return found;
}
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
DEVICE float load_shared_float(uint32_t from) {
  uint32_t found;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(found) : "r"(from) : "memory");
  return __uint_as_float(found);
}
DEVICE void store_shared(uint32_t to, uint4 value) {
  asm volatile("st.shared.v4.u32 [%0], {%1,%2,%3,%4};" ::"r"(to), "r"(value.x), "r"(value.y), "r"(value.z),
               "r"(value.w)
               : "memory");
}
DEVICE void store_shared_float(uint32_t to, float value) {
  asm volatile("st.shared.u32 [%0], %1;" ::"r"(to), "r"(__float_as_uint(value)) : "memory");
}

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
#endif
