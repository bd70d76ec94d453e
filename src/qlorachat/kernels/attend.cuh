// What attention's two kinds of caches share (attend_16_bits.cuh, attend_8_bits.cuh): compiled with HEAD_DIM and GROUP,
// the query heads of a key head.
#pragma once

#include "sums.cuh"

constexpr int WIDTH = GROUP * HEAD_DIM;  // of the queries of one key head
constexpr int WARPS = 4, THREADS = WARPS * 32;
constexpr float NOTHING = -1e30f;        // the peak of no scores; finite, for differences of two

// A position of one key head in the cache.
struct Place {
  u64 block;  // its block's first element
  int offset, head, heads, shift;  // in the block, which has 1 << shift positions
  __device__ __forceinline__ u64 element() const { return block + (offset * heads + head) * HEAD_DIM; }
  __device__ __forceinline__ int stride() const { return heads * HEAD_DIM; }  // from one position to the next
};
