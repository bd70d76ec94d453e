// How the kernels of a fused step read what a product left, and write the next one's x.
//
// Sums are float32 [M, N], a row of x each; who reads them leaves zeros. All in bfloat16 otherwise.
#pragma once

#include "common.cuh"

__device__ __forceinline__ float low_half(u32 pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high_half(u32 pair) { return __uint_as_float(pair & 0xFFFF0000u); }

__device__ __forceinline__ u32 round_pair(float low, float high) {
  u32 pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
// Two numbers as a pair, and what they are more than that: digits of two bfloat16.
__device__ __forceinline__ void split_pair(float low, float high, u32& pair, u32& rest) {
  pair = round_pair(low, high);
  rest = round_pair(low - low_half(pair), high - high_half(pair));
}
__device__ __forceinline__ float rounded(float value) { return low_half(round_pair(value, 0.f)); }

__device__ __forceinline__ void add_pair(float* at, float a, float b) {
#if __CUDA_ARCH__ >= 900
  asm volatile("red.global.add.v2.f32 [%0], {%1, %2};" ::"l"(at), "f"(a), "f"(b) : "memory");
#else
  atomicAdd(at, a);
  atomicAdd(at + 1, b);
#endif
}

__device__ __forceinline__ void add_four(float* at, const float4& four) {
#if __CUDA_ARCH__ >= 900
  asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(at), "f"(four.x), "f"(four.y), "f"(four.z), "f"(four.w)
               : "memory");
#else
  add_pair(at, four.x, four.y);
  add_pair(at + 2, four.z, four.w);
#endif
}

// Of 16 rows of the weight and 8 of x, as mma leaves them: added to sums from `to` on, for x's rows whose
// bit is set. A lane has two rows of x for one of the weight; with the one that has the next row of the weight,
// NEXT lanes away, it makes that one for two.
template <int NEXT> __device__ __forceinline__ void add_tile(float* to, const float (&sum)[4], int outputs, u32 rows) {
  const int lane = threadIdx.x & 31, row = NEXT == 4 ? lane >> 2 & 6 : (lane >> 2 & 3) * 2;
  const bool odd = lane & NEXT;
  const int x_row = 2 * (lane & 3) + (odd ? 1 : 0);
  to += static_cast<u64>(x_row) * outputs + row;
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const float even_row = sum[2 * half], odd_row = sum[2 * half + 1];
    const float got = __shfl_xor_sync(~0u, odd ? even_row : odd_row, NEXT);
    if (rows >> x_row & 1) add_pair(to + 8 * half, odd ? got : even_row, odd ? odd_row : got);
  }
}

// The place of (row, column) in a tiled x of P padded rows (tiles.py); a column and the next one, if
// the first is even, are neighbours.
__device__ __forceinline__ int tiled_at(int row, int column, int padded) {
  const int inner = column & 63, piece = (inner & 15) >> 1 ^ (row & 7);
  return ((column >> 6) * padded + row) * 64 + piece * 8 + (inner >> 4) * 2 + (inner & 1);
}

// 1 / rms of a row before the norm that was put off, of its squares' sum; share: 1 / its columns.
__device__ __forceinline__ float inverse_rms(float squares, float share, float eps) { return rsqrtf(squares * share + eps); }

// Of the slots that lanes have, that of the first lane in `left`, a bit each, 0 if none is left; all lanes that
// have it are taken out.
__device__ __forceinline__ int take_slot(int mine, u32& left) {
  const int slot = left ? __shfl_sync(~0u, mine, __ffs(left) - 1) : 0;
  left &= ~__ballot_sync(~0u, mine == slot);
  return slot;
}

// Of each 16 ranks A has those of all parts, then the next 16: the first ones of all parts, that rows have, are the
// first ones of a slot.

// shrunk += A x, of a product's x: by who makes that, or beside the product.
struct Shrinking {
  const u16* a;      // [slots, held, K]; null: no row has an adapter, or not here
  const int* slots;  // of each row, from 1; 0 for none
  float* shrunk;     // A x of each row's own slot, [M, ranks], a row `stride` after the one before
  int stride, held;
  int ranks;  // of all parts, the first ones, that rows have
};

// sums += scale * B (A x): beside the product, or by who reads its sums. All warps of a card read A x at once: by way
// of the L1 (__ldca), and as the squares.
struct Expanding {
  const float* shrunk;  // A x, [M, ranks / 16, parts, 16], a row `stride` after the one before
  const u16* b;         // [slots, N, held]; null: no row has an adapter, or not here
  const int* slots;     // of each row, from 1; 0 for none
  const float* scales;  // of each row
  int stride, held;
  int ranks;  // the first ones, that rows have
};
