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
__device__ __forceinline__ float rounded(float value) { return low_half(round_pair(value, 0.f)); }

__device__ __forceinline__ void add_four(float* at, float a, float b, float c, float d) {
#if __CUDA_ARCH__ >= 900
  asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(at), "f"(a), "f"(b), "f"(c), "f"(d) : "memory");
#else
  atomicAdd(at, a);
  atomicAdd(at + 1, b);
  atomicAdd(at + 2, c);
  atomicAdd(at + 3, d);
#endif
}

// The place of (row, column) in a tiled x of P padded rows (tiles.py); a column and the next one, if
// the first is even, are neighbours.
__device__ __forceinline__ int tiled_at(int row, int column, int padded) {
  const int inner = column & 63, piece = (inner & 15) >> 1 ^ (row & 7);
  return ((column >> 6) * padded + row) * 64 + piece * 8 + (inner >> 4) * 2 + (inner & 1);
}

// 1 / rms of a row before the norm that was put off; share: 1 / its columns.
__device__ __forceinline__ float inverse_rms(const float* squares, int row, float share, float eps) {
  return rsqrtf(__ldcg(squares + row) * share + eps);
}

// The adapters of the product that follows.
struct Adapters {
  const u16* a;      // [count, ranks, K], ranks of all parts; null: no row has an adapter
  const int* slots;  // of each row, from 1; 0 for none
  float* shrunk;     // A x, [M, count * ranks], added to
  int count, ranks;
};
