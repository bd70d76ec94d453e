// Keys and values in 16 bit; what a warp makes of them is in attend_16_bits_single.cuh, if a key head has one query head,
// or attend_16_bits_grouped.cuh.
#pragma once

#include "attend.cuh"

typedef u16 Cached;
constexpr int ROW = HEAD_DIM;         // elements of a position's key or value in a block
constexpr int LANES = HEAD_DIM / 8;   // 8 elements each
constexpr int TOGETHER = 32 / LANES;  // positions of one load of a warp
constexpr int STEP = 8;               // positions of a warp at a time
constexpr int LOADS = STEP / TOGETHER;
constexpr int VALUES = STEP * HEAD_DIM * 2, STAGE_BYTES = 2 * VALUES;  // of a step; values begin behind its keys
static_assert(LANES * TOGETHER == 32 && LOADS * TOGETHER == STEP, "HEAD_DIM of 64, 128 or 256");

// The key and the value of the new position.
struct Fresh {
  __align__(16) Cached of[2][HEAD_DIM];
  // cache: that keeps it, null: none
  __device__ __forceinline__ void put(int which, int inner, float value, Cached* cache, const Place& place) {
    const u16 half = static_cast<u16>(__float_as_uint(value) >> 16);
    of[which][inner] = half;
    if (cache) cache[place.element() + inner] = half;
  }
};

// A step's positions into a stage of the ring, zeros from `count` on; place: of the first. Where a lane's piece goes,
// `find` says.
template <class Find>
__device__ __forceinline__ void fetch_pieces(const Cached* keys, const Cached* values, const Place& place, int count, int lane, Find find) {
#pragma unroll
  for (int i = 0; i < LOADS; i++) {
    const int position = i * TOGETHER + lane / LANES;
    const u64 from = place.element() + position * place.stride() + lane % LANES * 8;
    copy<16>(find(i), keys + from, position < count);
    copy<16>(find(i) + VALUES, values + from, position < count);
  }
}
