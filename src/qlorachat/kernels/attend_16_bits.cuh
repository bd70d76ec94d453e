// What a warp sees of a context, with keys and values in 16 bit: 8 positions at a time, LANES threads each. Scores and
// sums are float32 on plain cores, which one query head a key head leaves idle.
#pragma once

#include "attend.cuh"

typedef u16 Cached;
constexpr int ROW = HEAD_DIM;         // elements of a position's key or value in a block
constexpr int LANES = HEAD_DIM / 8;   // 8 elements each
constexpr int TOGETHER = 32 / LANES;  // positions of one load of a warp
constexpr int STEP = 8;               // positions of a warp at a time
constexpr int LOADS = STEP / TOGETHER;
constexpr int LOAD_BYTES = 32 * 16, STAGE_BYTES = 2 * LOADS * LOAD_BYTES;  // a step's keys and values
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

// A step's positions into a stage of the ring, zeros from `count` on; place: of the first.
__device__ __forceinline__ void fetch_step(const Cached* keys, const Cached* values, const Place& place, int count, u32 stage, int lane) {
#pragma unroll
  for (int i = 0; i < LOADS; i++) {
    const int offset = i * TOGETHER + lane / LANES;
    const u64 from = place.element() + offset * place.stride() + lane % LANES * 8;
    const u32 to = stage + lane * 16 + i * LOAD_BYTES;
    copy<16>(to, keys + from, offset < count);
    copy<16>(to + LOADS * LOAD_BYTES, values + from, offset < count);
  }
}

struct Eight { float of[8]; };  // elements of a lane

__device__ __forceinline__ Eight read_piece(const void* at) {
  const uint4 pairs = *reinterpret_cast<const uint4*>(at);
  const u32 words[4] = {pairs.x, pairs.y, pairs.z, pairs.w};
  Eight eight;
#pragma unroll
  for (int e = 0; e < 8; e++) eight.of[e] = e & 1 ? high_half(words[e / 2]) : low_half(words[e / 2]);
  return eight;
}

struct Softmax {  // of one query head, over the positions that were seen
  float peak = NOTHING, total = 0.f, mixed[8] = {};

  __device__ __forceinline__ void rescale(float new_peak) {
    const float fading = exp2f(peak - new_peak);
    peak = new_peak;
    total *= fading;
#pragma unroll
    for (int e = 0; e < 8; e++) mixed[e] *= fading;
  }
  __device__ __forceinline__ void add(float share, const Eight& value) {
    total += share;
#pragma unroll
    for (int e = 0; e < 8; e++) mixed[e] += share * value.of[e];
  }
  // with those of the lanes that have other positions
  __device__ __forceinline__ void merge() {
#pragma unroll
    for (int step = LANES; step < 32; step *= 2) {
      rescale(fmaxf(peak, __shfl_xor_sync(~0u, peak, step)));
      total += __shfl_xor_sync(~0u, total, step);
#pragma unroll
      for (int e = 0; e < 8; e++) mixed[e] += __shfl_xor_sync(~0u, mixed[e], step);
    }
  }
};

struct Seen {
  const int lane;
  float q[GROUP][8];
  Softmax heads[GROUP];

  // queries: [GROUP, HEAD_DIM]
  __device__ __forceinline__ Seen(const float* queries, int lane) : lane(lane) {
#pragma unroll
    for (int g = 0; g < GROUP; g++)
#pragma unroll
      for (int e = 0; e < 8; e++) q[g][e] = queries[g * HEAD_DIM + lane % LANES * 8 + e];
  }
  // By all lanes of a position.
  __device__ __forceinline__ float score(int g, const Eight& key) const {
    float sum = q[g][0] * key.of[0];
#pragma unroll
    for (int e = 1; e < 8; e++) sum += q[g][e] * key.of[e];
#pragma unroll
    for (int step = 1; step < LANES; step *= 2) sum += __shfl_xor_sync(~0u, sum, step);
    return sum;
  }
  // The first `count` positions of a stage; a lane reads what it copied itself.
  __device__ __forceinline__ void add(const u8* stage, int count) {
    const u8* own = stage + lane * 16;
    float scores[GROUP][LOADS];
#pragma unroll
    for (int i = 0; i < LOADS; i++) {
      const Eight key = read_piece(own + i * LOAD_BYTES);
#pragma unroll
      for (int g = 0; g < GROUP; g++) scores[g][i] = score(g, key);
    }
#pragma unroll
    for (int g = 0; g < GROUP; g++) {
      float peak = heads[g].peak;
#pragma unroll
      for (int i = 0; i < LOADS; i++) {
        if (i * TOGETHER + lane / LANES >= count) scores[g][i] = NOTHING;
        peak = fmaxf(peak, scores[g][i]);
      }
      heads[g].rescale(peak);
    }
#pragma unroll
    for (int i = 0; i < LOADS; i++) {
      const Eight value = read_piece(own + (LOADS + i) * LOAD_BYTES);
      const bool seen = i * TOGETHER + lane / LANES < count;
#pragma unroll
      for (int g = 0; g < GROUP; g++) heads[g].add(seen ? exp2f(scores[g][i] - heads[g].peak) : 0.f, value);
    }
  }
  __device__ __forceinline__ void add_fresh(const Fresh& fresh, u8*) {
    const Eight key = read_piece(fresh.of[0] + lane % LANES * 8), value = read_piece(fresh.of[1] + lane % LANES * 8);
#pragma unroll
    for (int g = 0; g < GROUP; g++) {
      const float sum = score(g, key);
      if (lane < LANES) {
        heads[g].rescale(fmaxf(heads[g].peak, sum));
        heads[g].add(exp2f(sum - heads[g].peak), value);
      }
    }
  }
  // mixed: [GROUP, HEAD_DIM]; peaks, totals: [GROUP]
  __device__ __forceinline__ void leave(float* mixed, float* peaks, float* totals) {
#pragma unroll
    for (int g = 0; g < GROUP; g++) {
      heads[g].merge();
      if (lane >= LANES) continue;
#pragma unroll
      for (int e = 0; e < 8; e++) mixed[g * HEAD_DIM + lane * 8 + e] = heads[g].mixed[e];
      if (lane == 0) {
        peaks[g] = heads[g].peak;
        totals[g] = heads[g].total;
      }
    }
  }
};
