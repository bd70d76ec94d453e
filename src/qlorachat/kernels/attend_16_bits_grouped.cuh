// What a warp sees of a context, with keys and values in 16 bit and several query heads a key head: 8 positions at a time,
// by tensor cores.
//
// Queries are operand A of one product, keys, 16 elements by 8 positions, operand B; weights are A of another, values, 8
// positions by 8 elements, B. Queries and weights are split in two bfloat16, rows h and h + 8 of A for head h, so that no
// digit of note is lost. Lane 4 g + t then has scores of head g and positions 2 t and 2 t + 1, which is where the second
// product wants their weights, and sums of head g.
#pragma once

#include "attend_16_bits.cuh"

constexpr int LEAST_BLOCKS = HEAD_DIM == 128 ? 4 : 0;  // of a processor: 128 registers, else any number
constexpr int LINE = HEAD_DIM * 2;  // bytes of a position in a stage
constexpr int QUADS = LANES / 4;    // of four pieces of a position, 32 elements

// Pieces of a position are swapped, so that neither four of two positions nor one of all eight share a bank; in bytes.
__device__ __forceinline__ u32 swap_of(int position) { return ((position & 1) << 2 | position >> 1) << 4; }
__device__ __forceinline__ u32 place_of(int position, int piece) { return position * LINE + (piece << 4 ^ swap_of(position)); }
// From the place of one of the first four pieces to the same in another quad.
__device__ __forceinline__ u32 go_on(u32 place, int quad) { return (place ^ (quad & 1) << 6) + (quad >> 1) * 128; }

__device__ __forceinline__ void fetch_step(const Cached* keys, const Cached* values, const Place& place, int count, u32 stage, int lane) {
  const u32 own = place_of(lane / LANES, lane % LANES);
  fetch_pieces(keys, values, place, count, lane, [&](int i) { return stage + (own ^ swap_of(i * TOGETHER)) + i * TOGETHER * LINE; });
}

// d [16, 8] += a [16, 8] b [8, 8]
__device__ __forceinline__ void multiply_half(float (&d)[4], u32 a0, u32 a1, u32 b) {
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a0), "r"(a1), "r"(b));
}

struct Seen {
  const int lane, g, t;
  u32 q[2 * QUADS][4];  // of 16 elements
  float peak = NOTHING, total = 0.f, sums[LANES][4] = {};

  // queries: [GROUP, HEAD_DIM]
  __device__ __forceinline__ Seen(const float* queries, int lane) : lane(lane), g(lane >> 2), t(lane & 3) {
#pragma unroll
    for (int step = 0; step < 2 * QUADS; step++) {
      // half of a piece, which lane t has of pieces 4 i + t
      const int element = (step >> 1) * 32 + t * 8 + (step & 1) * 4;
      const float4 four = g < GROUP ? *reinterpret_cast<const float4*>(queries + g * HEAD_DIM + element)
                                    : make_float4(0.f, 0.f, 0.f, 0.f);
      split_pair(four.x, four.y, q[step][0], q[step][1]);
      split_pair(four.z, four.w, q[step][2], q[step][3]);
    }
  }
  // The first `count` positions of a stage.
  __device__ __forceinline__ void add(const u8* stage, int count) {
    __syncwarp();  // all copies are there
    float products[2][4] = {};
    const u32 keys = place_of(g, t);
#pragma unroll
    for (int i = 0; i < QUADS; i++) {
      const uint4 key = *reinterpret_cast<const uint4*>(stage + go_on(keys, i));
      const u32(&first)[4] = q[2 * i], (&second)[4] = q[2 * i + 1];
      multiply(products[0], first[0], first[1], first[2], first[3], key.x, key.y);
      multiply(products[1], second[0], second[1], second[2], second[3], key.z, key.w);
    }
    float weights[2];
    bool seen[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
      seen[i] = 2 * t + i < count;
      weights[i] = seen[i] ? products[0][i] + products[1][i] + products[0][i + 2] + products[1][i + 2] : NOTHING;
    }
    float highest = fmaxf(peak, fmaxf(weights[0], weights[1]));
#pragma unroll
    for (int step = 1; step < 4; step *= 2) highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, step));
    if (__ballot_sync(~0u, highest > peak)) rescale(highest);
#pragma unroll
    for (int i = 0; i < 2; i++) {
      weights[i] = seen[i] ? exp2f(weights[i] - peak) : 0.f;
      total += weights[i];
    }
    u32 pair, rest;
    split_pair(weights[0], weights[1], pair, rest);
    const u32 values = static_cast<u32>(__cvta_generic_to_shared(stage)) + VALUES, own = place_of(lane & 7, lane >> 3);
#pragma unroll
    for (int i = 0; i < QUADS; i++) {
      u32 words[4];
      load_matrices<true>(words, values + go_on(own, i));
#pragma unroll
      for (int piece = 0; piece < 4; piece++) multiply_half(sums[4 * i + piece], pair, rest, words[piece]);
    }
    __syncwarp();  // all have read them
  }
  __device__ __forceinline__ void rescale(float highest) {
    const float fading = exp2f(peak - highest);
    peak = highest;
    total *= fading;
#pragma unroll
    for (int piece = 0; piece < LANES; piece++)
#pragma unroll
      for (int i = 0; i < 4; i++) sums[piece][i] *= fading;
  }
  // stage: any that is not on its way
  __device__ __forceinline__ void add_fresh(const Fresh& fresh, u8* stage) {
    for (int i = lane; i < STEP * LANES; i += 32) {  // what it had may be infinite, which no weight of 0 would stop
      const int position = i / LANES, piece = i % LANES;
#pragma unroll
      for (int which = 0; which < 2; which++)
        *reinterpret_cast<uint4*>(stage + which * VALUES + place_of(position, piece)) =
            position ? make_uint4(0, 0, 0, 0) : *reinterpret_cast<const uint4*>(fresh.of[which] + piece * 8);
    }
    add(stage, 1);
  }
  // mixed: [GROUP, HEAD_DIM]; peaks, totals: [GROUP]
  __device__ __forceinline__ void leave(float* mixed, float* peaks, float* totals) {
#pragma unroll
    for (int step = 1; step < 4; step *= 2) total += __shfl_xor_sync(~0u, total, step);
    if (g >= GROUP) return;
#pragma unroll
    for (int piece = 0; piece < LANES; piece++) {
      const float(&sum)[4] = sums[piece];
      *reinterpret_cast<float2*>(mixed + g * HEAD_DIM + piece * 8 + 2 * t) = make_float2(sum[0] + sum[2], sum[1] + sum[3]);
    }
    if (t) return;
    peaks[g] = peak;
    totals[g] = total;
  }
};
