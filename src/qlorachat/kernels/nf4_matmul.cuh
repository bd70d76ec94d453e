// What both NF4 products share: the list of units that their blocks work through, decoding, and what the
// adapters add. All in bfloat16.
//
// Tiled x: [K / 64, P, 64] in units of 4 blocks, the last one padded with zeros. In a block, weight j
// is at 16 s + 8 h + 2 t + e, where lane t of a quad decodes it for step s, register half h; 16-byte
// pieces of a row are stored at their place xor the row's last three bits (128-byte swizzle).
#pragma once

#include "nf4.cuh"
#include "sums.cuh"

constexpr int CHUNK = 4;  // blocks of 64 k in a unit

// Units of 256 k of all row blocks, one after the other.
struct Walk {
  int item, row_block;
  __device__ Walk(int items, int unit) : item(unit % items), row_block(unit / items) {}
  __device__ bool next(int items) {  // whether the row block was left
    if (++item < items) return false;
    item = 0;
    row_block++;
    return true;
  }
};

// What a warp knows of absmax2 for a unit: of a lane's rows, 8 apart.
// ALIGNED: K is a multiple of 256, so that a unit's row lies in one group of 256 absmax bytes.
template <bool ALIGNED> struct Scales {
  float groups[2][ALIGNED ? 1 : CHUNK], offset;
  __device__ __forceinline__ void load(const Matrix& m, const Part& part, int row, int item) {
    const int blocks = m.columns >> 6;
    offset = part.offset;
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const u32 index = (row + half * 8 - part.start) * blocks + item * CHUNK;
#pragma unroll
      for (int j = 0; j < (ALIGNED ? 1 : CHUNK); j++)
        groups[half][j] = ALIGNED || item * CHUNK + j < blocks ? __ldg(m.absmax2 + (part.group + ((index + j) >> 8))) : 0.f;
    }
  }
  // absmax of block `j` of a unit, whose absmax bytes are given.
  __device__ __forceinline__ float factor(const u32 (&absmax)[2], int half, int j) const {
    const u32 code = look_up(absmax[half], (threadIdx.x & 31) * 4 + 128, j);
    return __uint_as_float(code) * groups[half][ALIGNED ? 0 : j] + offset;
  }
};

// Operand A of product s of a block's four, of a lane's 16 weights in each of two rows.
__device__ __forceinline__ void decode_step(const uint2 (&words)[2], int s, u32* into) {
  const u32 offset = (threadIdx.x & 31) * 4;
  const u32 low = s < 2 ? words[0].x : words[0].y, high = s < 2 ? words[1].x : words[1].y, i = (s & 1) * 2;
  into[0] = look_up(low, offset, i);
  into[1] = look_up(high, offset, i);
  into[2] = look_up(low, offset, i + 1);
  into[3] = look_up(high, offset, i + 1);
}
__device__ __forceinline__ void decode(const uint2 (&words)[2], u32 (&into)[16]) {
#pragma unroll
  for (int s = 0; s < 4; s++) decode_step(words, s, into + 4 * s);
}

__device__ __forceinline__ void add_pair(float* at, float a, float b) {
#if __CUDA_ARCH__ >= 900
  asm volatile("red.global.add.v2.f32 [%0], {%1, %2};" ::"l"(at), "f"(a), "f"(b) : "memory");
#else
  atomicAdd(at, a);
  atomicAdd(at + 1, b);
#endif
}

// Of 16 rows of the weight and 8 of x, as mma leaves them: added to sums from `to` on, for x's rows whose
// bit is set. A lane has two rows of x for one of the weight; with its neighbour it makes that one for two.
__device__ __forceinline__ void add_tile(float* to, const float (&sum)[4], int outputs, u32 rows) {
  const int lane = threadIdx.x & 31, quad = lane >> 2;
  const bool odd = lane & 4;
  const int x_row = 2 * (lane & 3) + (odd ? 1 : 0);
  to += static_cast<u64>(x_row) * outputs + (quad & 6);
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const float even_row = sum[2 * half], odd_row = sum[2 * half + 1];
    const float got = __shfl_xor_sync(~0u, odd ? even_row : odd_row, 4);
    if (rows >> x_row & 1) add_pair(to + 8 * half, odd ? got : even_row, odd ? odd_row : got);
  }
}

struct RowAdapters {
  const float* shrunk;  // A x, [M, count, parts, ranks]
  const u16* b;         // [count, N, ranks]; null: no row has an adapter
  const int* slots;     // of each row, from 1; 0 for none
  const float* scales;  // of each row
  int count, ranks;
};

// sums += scale * B (A x), by warp `share` of `shares`: an equal run of all pairs of 16 rows of x and 16
// of the weight. B is operand A of mma; A x is operand B, split in two bfloat16 so that no digit of note
// is lost. A slot is taken once for all rows that have it.
template <int P> struct Expansion {
  static constexpr int SET = P < 16 ? P : 16, TILES = SET / 8, STEPS = 4;  // rows; of 8 rows; of 16 ranks held at a time
  const RowAdapters& adapters;
  const Matrix& m;
  const int lane, quad, t, parts;
  int slot;                     // of row `lane` of the set
  float scale;
  u32 all;                      // rows that have an adapter, a bit each
  u32 shrunk[STEPS][TILES][4];  // of each row's own slot, ranks 4 t to 4 t + 3: two pairs of high parts, two of low ones
  uint2 low[STEPS], high[STEPS];  // B of the weight's rows `quad` and 8 further
  float added[TILES][4];

  __device__ __forceinline__ Expansion(const RowAdapters& adapters, const Matrix& m)
      : adapters(adapters), m(m), lane(threadIdx.x & 31), quad(lane >> 2), t(lane & 3),
        parts(1 + (m.start1 < m.rows) + (m.start2 < m.rows)) {}

  __device__ __forceinline__ const u16* find_b(int slot, int row) const {
    return adapters.b + (static_cast<u64>(slot - 1) * m.rows + row) * adapters.ranks;
  }
  __device__ __forceinline__ int part_of(int group) const { return (group * 16 >= m.start1) + (group * 16 >= m.start2); }

  __device__ __forceinline__ void look_at(int set, int x_rows) {
    const int row = set * SET + lane;
    const bool inside = lane < SET && row < x_rows;
    slot = inside ? __ldg(adapters.slots + row) : 0;
    scale = inside ? __ldg(adapters.scales + row) : 0.f;
    all = __ballot_sync(~0u, slot > 0);
  }
  // No kernel of the step writes B: it comes to the L2 before the wait.
  __device__ __forceinline__ void send_for_b(int begin, int end) const {
    for (u32 remaining = all; remaining;) {
      const int own = __shfl_sync(~0u, slot, __ffs(remaining) - 1);
      remaining &= ~__ballot_sync(~0u, slot == own);
      for (int at = lane * 64; at < (end - begin) * 16 * adapters.ranks; at += 32 * 64) prefetch(find_b(own, begin * 16) + at);
    }
  }
  __device__ __forceinline__ void hold_shrunk(int set, int part, int first) {
#pragma unroll
    for (int c = 0; c < TILES; c++) {
      const int own = __shfl_sync(~0u, slot, 8 * c + quad);
      const float factor = __shfl_sync(~0u, scale, 8 * c + quad);
      const u64 row = static_cast<u64>(set * SET + 8 * c + quad) * adapters.count + max(own - 1, 0);
      const float4* from = reinterpret_cast<const float4*>(adapters.shrunk + (row * parts + part) * adapters.ranks + first);
#pragma unroll
      for (int s = 0; s < STEPS; s++) {
        float4 x = make_float4(0.f, 0.f, 0.f, 0.f);
        if (own && first + 16 * s < adapters.ranks) x = __ldcg(from + 4 * s + t);
        u32* pairs = shrunk[s][c];
        pairs[0] = round_pair(factor * x.x, factor * x.y);
        pairs[1] = round_pair(factor * x.z, factor * x.w);
        pairs[2] = round_pair(factor * x.x - low_half(pairs[0]), factor * x.y - high_half(pairs[0]));
        pairs[3] = round_pair(factor * x.z - low_half(pairs[1]), factor * x.w - high_half(pairs[1]));
      }
    }
  }
  __device__ __forceinline__ void load(int i, int own, int group, int rank) {
    const bool inside = own && rank < adapters.ranks;
    const u16* at = find_b(own ? own : 1, group * 16 + quad) + (inside ? rank : 0) + 4 * t;
    low[i] = inside ? __ldg(reinterpret_cast<const uint2*>(at)) : make_uint2(0, 0);
    high[i] = inside ? __ldg(reinterpret_cast<const uint2*>(at + 8 * adapters.ranks)) : make_uint2(0, 0);
  }
  __device__ __forceinline__ void add(int i, int s, u32 rows) {
#pragma unroll
    for (int c = 0; c < TILES; c++) {
      if (!(rows >> (8 * c) & 255)) continue;
      const u32 own = rows >> (8 * c + quad) & 1 ? ~0u : 0;
      const u32(&pairs)[4] = shrunk[s][c];
      multiply(added[c], low[i].x, high[i].x, low[i].y, high[i].y, pairs[0] & own, pairs[1] & own);
      multiply(added[c], low[i].x, high[i].x, low[i].y, high[i].y, pairs[2] & own, pairs[3] & own);
    }
  }
  // B of four pieces is loaded before any is used: four slots, where one step has all ranks, else steps.
  __device__ __forceinline__ void multiply_group(int group, int first) {
#pragma unroll
    for (int c = 0; c < TILES; c++)
#pragma unroll
      for (int i = 0; i < 4; i++) added[c][i] = 0.f;
    for (u32 remaining = all; remaining;) {
      if (adapters.ranks == 16) {
        u32 rows[STEPS];
#pragma unroll
        for (int i = 0; i < STEPS; i++) {
          const int own = remaining ? __shfl_sync(~0u, slot, __ffs(remaining) - 1) : 0;
          rows[i] = own ? __ballot_sync(~0u, slot == own) : 0;
          remaining &= ~rows[i];
          load(i, own, group, 0);
        }
#pragma unroll
        for (int i = 0; i < STEPS; i++) add(i, 0, rows[i]);
      } else {
        const int own = __shfl_sync(~0u, slot, __ffs(remaining) - 1);
        const u32 rows = __ballot_sync(~0u, slot == own);
        remaining &= ~rows;
#pragma unroll
        for (int i = 0; i < STEPS; i++) load(i, own, group, first + 16 * i);
#pragma unroll
        for (int i = 0; i < STEPS; i++) add(i, i, rows);
      }
    }
  }
  __device__ __forceinline__ void leave(float* sums, int set, int group) const {
    float* to = sums + static_cast<u64>(set * SET) * m.rows + group * 16;
#pragma unroll
    for (int c = 0; c < TILES; c++) add_tile(to + static_cast<u64>(8 * c) * m.rows, added[c], m.rows, all >> (8 * c));
  }
  __device__ __forceinline__ void operator()(float* sums, int x_rows, int share, int shares) {
    const int groups = m.rows >> 4, sets = (x_rows + SET - 1) / SET;
    const int begin = groups * sets * share / shares, end = groups * sets * (share + 1) / shares;
    bool waited = false;
    for (int at = begin; at < end;) {
      const int set = at / groups, first_group = at - set * groups, last_group = min(groups, end - set * groups);
      at += last_group - first_group;
      look_at(set, x_rows);
      send_for_b(first_group, last_group);
      if (!waited) wait_for_previous();
      waited = true;
      if (!all) continue;
      for (int first = 0; first < adapters.ranks; first += 16 * STEPS)
        for (int group = first_group, known = -1; group < last_group; group++) {
          if (part_of(group) != known) hold_shrunk(set, known = part_of(group), first);
          multiply_group(group, first);
          leave(sums, set, group);
        }
    }
  }
};
