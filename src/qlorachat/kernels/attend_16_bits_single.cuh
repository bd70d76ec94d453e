// What a warp sees of a context, with keys and values in 16 bit and one query head a key head: 8 positions at a time, LANES
// threads each. Scores and sums are float32 on plain cores: of a tensor core's 16 rows 15 would be empty.
#pragma once

#include "attend_16_bits.cuh"

constexpr int LEAST_BLOCKS = 0;  // of a processor: any number of registers
constexpr int LOAD_BYTES = 32 * 16;

__device__ __forceinline__ void fetch_step(const Cached* keys, const Cached* values, const Place& place, int count, u32 stage, int lane) {
  fetch_pieces(keys, values, place, count, lane, [&](int i) { return stage + lane * 16 + i * LOAD_BYTES; });
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

struct Softmax {  // over the positions that were seen
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
  float q[8];
  Softmax softmax;

  // queries: [HEAD_DIM]
  __device__ __forceinline__ Seen(const float* queries, int lane) : lane(lane) {
#pragma unroll
    for (int e = 0; e < 8; e++) q[e] = queries[lane % LANES * 8 + e];
  }
  // By all lanes of a position.
  __device__ __forceinline__ float score(const Eight& key) const {
    float sum = q[0] * key.of[0];
#pragma unroll
    for (int e = 1; e < 8; e++) sum += q[e] * key.of[e];
#pragma unroll
    for (int step = 1; step < LANES; step *= 2) sum += __shfl_xor_sync(~0u, sum, step);
    return sum;
  }
  // The first `count` positions of a stage; a lane reads what it copied itself.
  __device__ __forceinline__ void add(const u8* stage, int count) {
    const u8* own = stage + lane * 16;
    float scores[LOADS], peak = softmax.peak;
#pragma unroll
    for (int i = 0; i < LOADS; i++) scores[i] = score(read_piece(own + i * LOAD_BYTES));
#pragma unroll
    for (int i = 0; i < LOADS; i++) {
      if (i * TOGETHER + lane / LANES >= count) scores[i] = NOTHING;
      peak = fmaxf(peak, scores[i]);
    }
    softmax.rescale(peak);
#pragma unroll
    for (int i = 0; i < LOADS; i++) {
      const Eight value = read_piece(own + (LOADS + i) * LOAD_BYTES);
      const bool seen = i * TOGETHER + lane / LANES < count;
      softmax.add(seen ? exp2f(scores[i] - softmax.peak) : 0.f, value);
    }
  }
  __device__ __forceinline__ void add_fresh(const Fresh& fresh, u8*) {
    const Eight key = read_piece(fresh.of[0] + lane % LANES * 8), value = read_piece(fresh.of[1] + lane % LANES * 8);
    const float sum = score(key);
    if (lane >= LANES) return;
    softmax.rescale(fmaxf(softmax.peak, sum));
    softmax.add(exp2f(sum - softmax.peak), value);
  }
  // mixed: [HEAD_DIM]; peak, total: one number
  __device__ __forceinline__ void leave(float* mixed, float* peak, float* total) {
    softmax.merge();
    if (lane >= LANES) return;
#pragma unroll
    for (int e = 0; e < 8; e++) mixed[lane * 8 + e] = softmax.mixed[e];
    if (lane) return;
    *peak = softmax.peak;
    *total = softmax.total;
  }
};
