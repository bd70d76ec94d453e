// How the kernels of a fused step read what a product left: W x, and beside it A x of every adapter.
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

// The place of (row, column) in a tiled x of P padded rows (tiles.py); a column and the next one, if
// the first is even, are neighbours.
__device__ __forceinline__ int tiled_at(int row, int column, int padded) {
  const int inner = column & 63, lane = (inner >> 4 & 1) * 2 + (inner >> 5), piece = (inner & 15) >> 1 ^ (row & 7);
  return ((column >> 6) * padded + row) * 64 + piece * 8 + lane * 2 + (inner & 1);
}

struct Adapters {
  const float* shrunk;  // A x, [M, count, ranks of each part]
  const u16* b;         // [count, outputs, ranks]; null: no row has an adapter
  const int* slots;     // of each row, from 1; 0 for none
  const float* scales;  // of each row
  int count, ranks, outputs;
};

// What adapters add to sums of 8 rows and TILES * 16 columns in each of PARTS: a warp's, as mma leaves
// them. Lane 4 g + t has columns 2 g and 2 g + 1 of each 16, of rows 2 t and 2 t + 1. A x is split in
// two bfloat16, so that no digit of note is lost. A slot is taken once for all rows that have it.
template <int PARTS, int TILES> struct Expansion {
  const Adapters& adapters;
  const int lane, row, rows, column, height;  // height: columns of a part
  int mine, slot;                             // slots: of row `row`, and the one whose B is held
  u32 remaining;                              // lanes whose slots are yet to be taken
  uint2 words[PARTS][TILES][2];               // of the first 16 ranks

  // No kernel writes B within a step: this may be before the wait.
  __device__ __forceinline__ Expansion(const Adapters& adapters, int first_row, int rows, int first_column, int height)
      : adapters(adapters), lane(threadIdx.x & 31), row(first_row + (lane >> 2)), rows(rows),
        column(first_column + (lane >> 2) * 2), height(height), mine(0), slot(0) {
    if (adapters.b && row < rows) mine = __ldg(adapters.slots + row);
    remaining = __ballot_sync(~0u, mine > 0);
    if (remaining) hold_next();
  }

  __device__ __forceinline__ const u16* find(int part, int tile, int rank) const {
    const u64 own = static_cast<u64>(slot - 1) * adapters.outputs + part * height + column + tile * 16;
    return adapters.b + own * adapters.ranks + rank + (lane & 3) * 4;
  }
  __device__ __forceinline__ void hold_next() {
    slot = __shfl_sync(~0u, mine, __ffs(remaining) - 1);
#pragma unroll
    for (int p = 0; p < PARTS; p++)
#pragma unroll
      for (int tile = 0; tile < TILES; tile++) {
        const u16* at = find(p, tile, 0);
        words[p][tile][0] = __ldg(reinterpret_cast<const uint2*>(at));
        words[p][tile][1] = __ldg(reinterpret_cast<const uint2*>(at + adapters.ranks));
      }
  }

  __device__ __forceinline__ void add(float (&values)[PARTS][TILES][4]) {
    while (remaining) {
      const bool own = mine == slot;
      const float scale = own ? __ldg(adapters.scales + row) : 0.f;
      const float* shrunk = adapters.shrunk + (static_cast<u64>(own ? row : 0) * adapters.count + slot - 1) * PARTS * adapters.ranks;
      for (int rank = 0; rank < adapters.ranks; rank += 16) {
#pragma unroll
        for (int p = 0; p < PARTS; p++) {
          float4 x = __ldcg(reinterpret_cast<const float4*>(shrunk + p * adapters.ranks + rank) + (lane & 3));
          // what other rows have is not looked at: it may be infinite
          x = own ? make_float4(scale * x.x, scale * x.y, scale * x.z, scale * x.w) : make_float4(0, 0, 0, 0);
          const u32 high0 = round_pair(x.x, x.y), high1 = round_pair(x.z, x.w);
          const u32 low0 = round_pair(x.x - low_half(high0), x.y - high_half(high0));
          const u32 low1 = round_pair(x.z - low_half(high1), x.w - high_half(high1));
#pragma unroll
          for (int tile = 0; tile < TILES; tile++) {
            uint2 b0 = words[p][tile][0], b1 = words[p][tile][1];
            if (rank) {
              const u16* at = find(p, tile, rank);
              b0 = __ldg(reinterpret_cast<const uint2*>(at));
              b1 = __ldg(reinterpret_cast<const uint2*>(at + adapters.ranks));
            }
            float* own_values = values[p][tile];
            float sums[4] = {own_values[0], own_values[2], own_values[1], own_values[3]};
            multiply(sums, b0.x, b1.x, b0.y, b1.y, high0, high1);
            multiply(sums, b0.x, b1.x, b0.y, b1.y, low0, low1);
            own_values[0] = sums[0]; own_values[2] = sums[1]; own_values[1] = sums[2]; own_values[3] = sums[3];
          }
        }
      }
      remaining &= ~__ballot_sync(~0u, own);
      if (remaining) hold_next();
    }
  }
};

// 1 / rms of a row before the norm that was put off; share: 1 / its columns.
__device__ __forceinline__ float inverse_rms(const float* squares, int row, float share, float eps) {
  return rsqrtf(__ldcg(squares + row) * share + eps);
}
