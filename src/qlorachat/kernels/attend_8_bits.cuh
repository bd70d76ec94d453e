// What a warp sees of a context, with keys and values in 8 bits (eight_bits.py): 16 positions at a time, by tensor cores.
//
// Codes become float16, which has them all. Keys, 16 positions by 16 elements, are operand A of one product, queries
// operand B; values, 16 elements by 16 positions, that of another, with the weights of the positions as B. Queries and
// weights are split in two float16, columns 2 h and 2 h + 1 of B for head h, so that no digit of note is lost: lane
// 4 g + t then has scores and sums of head t, of four heads a tile.
#pragma once

#include "attend.cuh"

typedef u8 Cached;
constexpr int ROW = HEAD_DIM + 4;               // bytes of a position's key or value in a block, its scale with it
constexpr int LEAST_BLOCKS = 0;                 // of a processor: any number of registers
constexpr int STEP = 16;                        // positions of a warp at a time
constexpr int TILES = (GROUP + 3) / 4;          // of heads
constexpr int CHUNKS = HEAD_DIM / 16;           // of 16 elements
constexpr int TOGETHER = 32 / CHUNKS;           // positions of one load of a warp
constexpr int LOADS = STEP / TOGETHER;
constexpr int VALUES = STEP * HEAD_DIM, SCALES = 2 * VALUES;  // where they begin in a stage, after the keys' codes
constexpr int STAGE_BYTES = SCALES + 2 * STEP * 4;
static_assert(CHUNKS * TOGETHER == 32, "HEAD_DIM of 64, 128 or 256");

// A stage has codes as lines of 128 bytes, of two positions if a row is but 64. Chunks of a line are swapped, so that
// neither a chunk of 8 positions in a row nor four chunks of every second one share a bank.
__device__ __forceinline__ int line_of(int position, int chunk) {
  return HEAD_DIM == 64 ? (position >> 2) * 2 + (position & 1) : position * (HEAD_DIM / 128) + (chunk >> 3);
}
__device__ __forceinline__ int swap_of(int position) {
  return (position & 1) | (position >> 2 & 1) << 1 | (position >> 1 & 1) << 2;
}
// From the place of one to that of another whose position and chunk have these bits too.
__device__ __forceinline__ u32 go_on(u32 place, int position, int chunk) {
  return (place ^ ((chunk & 7) ^ swap_of(position)) << 4) + line_of(position, chunk) * 128;
}
__device__ __forceinline__ u32 place_of(int position, int chunk) { return go_on(0, position, chunk); }

__device__ __forceinline__ u32 pack_halves(float low, float high) {
  u32 pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
// Two numbers, and what they are more than float16 can say.
__device__ __forceinline__ void split(float low, float high, u32 (&pairs)[2]) {
  auto cut = [](float value) { return __uint_as_float(__float_as_uint(value) & 0xFFFFE000u); };
  pairs[0] = pack_halves(cut(low), cut(high));
  pairs[1] = pack_halves(low - cut(low), high - cut(high));
}

// Two of a word's codes, from 0x80 on, as float16: behind 0x64 a byte is 1,024 more than it was.
template <int LOW, int HIGH> __device__ __forceinline__ u32 widen(u32 word) {
  const u32 pair = __byte_perm(word, 0x64646464u, 0x4040u | HIGH << 8 | LOW);
  u32 codes;
  asm("sub.f16x2 %0, %1, %2;" : "=r"(codes) : "r"(pair), "r"(0x64806480u));
  return codes;
}

// d [16, 8] += a [16, 16] b [16, 8]
__device__ __forceinline__ void multiply_halves(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Where a block has it, behind all codes: those of a head follow each other.
__device__ __forceinline__ u64 scale_of(const Place& place) {
  return place.block + (place.stride() << place.shift) + ((place.head << place.shift) + place.offset) * 4;
}

// The key and the value of the new position.
struct Fresh {
  __align__(16) Cached codes[2][HEAD_DIM];
  float scales[2];
  float values[2][HEAD_DIM];  // before they are codes

  __device__ __forceinline__ void put(int which, int inner, float value, Cached*, const Place&) { values[which][inner] = value; }
  // The key or the value, by a warp. cache: that keeps it, null: none
  __device__ __forceinline__ void encode(int which, Cached* cache, const Place& place, int lane) {
    constexpr int OWN = HEAD_DIM / 32;  // elements of a lane
    float own[OWN], largest = 0.f;
#pragma unroll
    for (int i = 0; i < OWN; i++) {
      own[i] = values[which][lane + 32 * i];
      largest = fmaxf(largest, fabsf(own[i]));
    }
#pragma unroll
    for (int step = 1; step < 32; step *= 2) largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, step));
    const float scale = largest * (1 / 127.f), inverse = scale > 1e-38f ? 1.f / scale : 1.f;
#pragma unroll
    for (int i = 0; i < OWN; i++) {
      const u8 code = static_cast<u8>(static_cast<int>(floorf(own[i] * inverse + 0.5f)));
      codes[which][lane + 32 * i] = code;
      if (cache) cache[place.element() + lane + 32 * i] = code;
    }
    if (lane) return;
    scales[which] = scale;
    if (cache) *reinterpret_cast<float*>(cache + scale_of(place)) = scale;
  }
};

// A step's positions into a stage of the ring, zeros from `count` on, but any scales; place: of the first.
__device__ __forceinline__ void fetch_step(const Cached* keys, const Cached* values, const Place& place, int count, u32 stage, int lane) {
  const int first = lane / CHUNKS, chunk = lane % CHUNKS;
  const u32 own = stage + place_of(first, chunk);
#pragma unroll
  for (int i = 0; i < LOADS; i++) {
    const int position = i * TOGETHER;
    const u64 from = place.element() + (position + first) * place.stride() + chunk * 16;
    const u32 to = go_on(own, position, 0);
    copy<16>(to, keys + from, position + first < count);
    copy<16>(to + VALUES, values + from, position + first < count);
  }
  if (lane < 2 * STEP / 4) copy<16>(stage + SCALES + lane * 16, (lane < STEP / 4 ? keys : values) + scale_of(place) + lane % (STEP / 4) * 16);
}

struct Seen {
  const int lane, g, t;
  u32 q[TILES][CHUNKS][2];  // of 16 elements, a lane's 2 and 2
  float peaks[TILES], totals[TILES], sums[TILES][CHUNKS][4];

  // queries: [GROUP, HEAD_DIM]
  __device__ __forceinline__ Seen(const float* queries, int lane) : lane(lane), g(lane >> 2), t(lane & 3), totals(), sums() {
    const int part = g & 1;
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
      peaks[tile] = NOTHING;
      const int head = 4 * tile + (g >> 1);
#pragma unroll
      for (int step = 0; step < CHUNKS; step++) {
        // four codes of a word, which lane t has of chunk 4 i + t
        const int element = (step >> 2) * 64 + t * 16 + (step & 3) * 4;
        const float4 four = head < GROUP ? *reinterpret_cast<const float4*>(queries + head * HEAD_DIM + element)
                                         : make_float4(0.f, 0.f, 0.f, 0.f);
        u32 first[2], second[2];
        split(four.x, four.y, first);
        split(four.z, four.w, second);
        q[tile][step][0] = part ? first[1] : first[0];
        q[tile][step][1] = part ? second[1] : second[0];
      }
    }
  }
  // The first `count` positions of a stage.
  __device__ __forceinline__ void add(const u8* stage, int count) {
    __syncwarp();  // all copies are there
    float products[TILES][2][4] = {};
    const u32 keys = place_of(2 * g, t);
#pragma unroll
    for (int i = 0; i < CHUNKS / 4; i++) {
      const uint4 even = *reinterpret_cast<const uint4*>(stage + go_on(keys, 0, 4 * i));
      const uint4 odd = *reinterpret_cast<const uint4*>(stage + go_on(keys, 1, 4 * i));
      const u32 words[4][2] = {{even.x, odd.x}, {even.y, odd.y}, {even.z, odd.z}, {even.w, odd.w}};
#pragma unroll
      for (int w = 0; w < 4; w++) {
        const u32 a = words[w][0] ^ 0x80808080u, b = words[w][1] ^ 0x80808080u;
        const u32 key[4] = {widen<0, 1>(a), widen<0, 1>(b), widen<2, 3>(a), widen<2, 3>(b)};
#pragma unroll
        for (int tile = 0; tile < TILES; tile++) multiply_halves(products[tile][w & 1], key, q[tile][4 * i + w]);
      }
    }
    const float2 key_scales = *reinterpret_cast<const float2*>(stage + SCALES + g * 8);
    const float2 value_scales = *reinterpret_cast<const float2*>(stage + SCALES + STEP * 4 + g * 8);
    const bool seen[2] = {2 * g < count, 2 * g + 1 < count};
    // A weight has the value's scale in it and is one of a sum of at most 1 to the peak: float16 has it.
    const float scales[2] = {seen[0] ? fmaxf(value_scales.x, 1.2e-38f) : 1.f, seen[1] ? fmaxf(value_scales.y, 1.2e-38f) : 1.f};
    u32 weights[TILES][2];
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
      const float(&p)[2][4] = products[tile];
      const float scores[2] = {seen[0] ? (p[0][0] + p[1][0] + p[0][1] + p[1][1]) * key_scales.x : NOTHING,
                               seen[1] ? (p[0][2] + p[1][2] + p[0][3] + p[1][3]) * key_scales.y : NOTHING};
      float peak = fmaxf(peaks[tile], fmaxf(scores[0] + __log2f(scales[0]), scores[1] + __log2f(scales[1])));
#pragma unroll
      for (int step = 4; step < 32; step *= 2) peak = fmaxf(peak, __shfl_xor_sync(~0u, peak, step));
      if (__ballot_sync(~0u, peak > peaks[tile])) rescale(tile, peak);
      float own[2];
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const float share = seen[i] ? exp2f(scores[i] - peak) : 0.f;
        totals[tile] += share;
        own[i] = share * scales[i];
      }
      u32 pairs[2];
      split(own[0], own[1], pairs);
      const int from = t * 4 + (g >> 1);
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const u32 high = __shfl_sync(~0u, pairs[0], from + 16 * i), low = __shfl_sync(~0u, pairs[1], from + 16 * i);
        weights[tile][i] = g & 1 ? low : high;
      }
    }
    const u32 values = static_cast<u32>(__cvta_generic_to_shared(stage)) + VALUES + place_of(lane & 15, lane >> 4);
#pragma unroll
    for (int i = 0; i < CHUNKS / 2; i++) {
      u32 words[4];
      load_matrices<true>(words, go_on(values, 0, 2 * i));
#pragma unroll
      for (int chunk = 0; chunk < 2; chunk++) {
        const u32 a = words[2 * chunk] ^ 0x80808080u, b = words[2 * chunk + 1] ^ 0x80808080u;
        const u32 value[4] = {widen<0, 2>(a), widen<1, 3>(a), widen<0, 2>(b), widen<1, 3>(b)};
#pragma unroll
        for (int tile = 0; tile < TILES; tile++) multiply_halves(sums[tile][2 * i + chunk], value, weights[tile]);
      }
    }
    __syncwarp();  // all have read them
  }
  __device__ __forceinline__ void rescale(int tile, float peak) {
    const float fading = exp2f(peaks[tile] - peak);
    peaks[tile] = peak;
    totals[tile] *= fading;
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; chunk++)
#pragma unroll
      for (int i = 0; i < 4; i++) sums[tile][chunk][i] *= fading;
  }
  // stage: any that is not on its way
  __device__ __forceinline__ void add_fresh(const Fresh& fresh, u8* stage) {
    if (const int which = lane / CHUNKS, chunk = lane % CHUNKS; which < 2)
      *reinterpret_cast<uint4*>(stage + which * VALUES + chunk * 16) = *reinterpret_cast<const uint4*>(fresh.codes[which] + chunk * 16);
    if (lane < 2) *reinterpret_cast<float*>(stage + SCALES + lane * STEP * 4) = fresh.scales[lane];
    add(stage, 1);
  }
  // mixed: [GROUP, HEAD_DIM]; peaks, totals: [GROUP]
  __device__ __forceinline__ void leave(float* mixed, float* all_peaks, float* all_totals) {
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
      float total = totals[tile];
#pragma unroll
      for (int step = 4; step < 32; step *= 2) total += __shfl_xor_sync(~0u, total, step);
      const int head = 4 * tile + t;
      if (head >= GROUP) continue;
#pragma unroll
      for (int chunk = 0; chunk < CHUNKS; chunk++) {
        const float(&sum)[4] = sums[tile][chunk];
        *reinterpret_cast<float2*>(mixed + head * HEAD_DIM + chunk * 16 + 2 * g) = make_float2(sum[0] + sum[1], sum[2] + sum[3]);
      }
      if (g == 0) {
        all_peaks[head] = peaks[tile];
        all_totals[head] = total;
      }
    }
  }
};
