// Adapters beside an NF4 product, by warps of its own: A x of its x, or B (A x) into its sums.
#pragma once

#include "nf4.cuh"
#include "sums.cuh"

// shrunk += A x, by warp `share` of `shares`: an equal run of all triples of 64 columns, 16 ranks and the rows
// of a set that have one slot. A is operand A of mma, x, tiled, operand B. Of each 16 columns a lane has
// 4 t to 4 t + 3: in A these are side by side, in x they are in two pieces, each of which has two for all
// four 16s of a block.
template <int P> struct ShrinkBeside {
  static constexpr int SET = P < 16 ? P : 16, SETS = P / SET, TILES = SET / 8;  // rows; of 8 rows
  struct Rows { int set, slot; u32 mask; };  // of a set, those that have a slot: a bit each
  const Shrinking& adapters;
  const int lane, quad, t, tiles, columns;  // tiles: of 16 ranks
  int slots[P > 32 ? 2 : 1];  // of rows `lane` and 32 further
  int pairs;                  // of sets and slots
  int left;                   // of this warp's run
  int tile, pair, block;      // of the triple that is next
  Rows rows;
  uint2 a[4][2];              // of each 16 columns and ranks `quad` and 8 further

  // Until `take` has had enough.
  template <class Take> __device__ __forceinline__ void each_pair(Take take) const {
    for (int set = 0; set < SETS; set++) {
      const int own = P > 32 && set * SET >= 32 ? slots[P > 32] : slots[0], shift = set * SET & 31;
      constexpr u32 inside = (1u << SET) - 1;
      for (u32 remaining = __ballot_sync(~0u, own > 0) >> shift & inside; remaining;) {
        const int slot = __shfl_sync(~0u, own, __ffs(remaining) - 1 + shift);
        const u32 mask = __ballot_sync(~0u, own == slot) >> shift & inside;
        remaining &= ~mask;
        if (!take(Rows{set, slot, mask})) return;
      }
    }
  }
  // Not __ldg: the compiler would move it behind the wait.
  __device__ __forceinline__ void load() {
    int before = pair;
    each_pair([&](const Rows& found) {
      rows = found;
      return before-- > 0;
    });
    const u16* from = adapters.a + (static_cast<u64>(rows.slot - 1) * adapters.held + tile * 16 + quad) * columns + block * 64 + 4 * t;
#pragma unroll
    for (int q = 0; q < 4; q++)
#pragma unroll
      for (int half = 0; half < 2; half++)
        a[q][half] = __ldcg(reinterpret_cast<const uint2*>(from + 16 * q + static_cast<u64>(8 * half) * columns));
  }

  // No kernel of the step writes A: this may be before the wait.
  __device__ __forceinline__ ShrinkBeside(const Shrinking& adapters, int columns, int x_rows, int share, int shares)
      : adapters(adapters), lane(threadIdx.x & 31), quad(lane >> 2), t(lane & 3), tiles(adapters.ranks >> 4),
        columns(columns), pairs(0) {
#pragma unroll
    for (int i = 0; i < (P > 32 ? 2 : 1); i++) {
      const int row = 32 * i + lane;
      slots[i] = row < x_rows ? __ldg(adapters.slots + row) : 0;
    }
    each_pair([&](const Rows&) {
      pairs++;
      return true;
    });
    const int all = pairs * tiles * (columns >> 6);
    const int begin = static_cast<int>(static_cast<long long>(all) * share / shares);
    left = static_cast<int>(static_cast<long long>(all) * (share + 1) / shares) - begin;
    if (!left) return;
    tile = begin % tiles;
    pair = begin / tiles % pairs;
    block = begin / tiles / pairs;
    load();
  }
  __device__ __forceinline__ void next() {
    if (++tile < tiles) return;
    tile = 0;
    if (++pair < pairs) return;
    pair = 0;
    block++;
  }
  __device__ __forceinline__ void add(const u16* x) const {
    const uint4* from = reinterpret_cast<const uint4*>(x + (static_cast<u64>(block) * P + rows.set * SET + quad) * 64);
    uint4 pieces[TILES][2];
#pragma unroll
    for (int c = 0; c < TILES; c++)
#pragma unroll
      for (int i = 0; i < 2; i++) pieces[c][i] = __ldcg(from + 64 * c + (2 * t + i ^ quad));
    const u64 row_size = adapters.stride;
    float* to = adapters.shrunk + (rows.set * SET + 2 * t) * row_size + tile * 16 + quad;
#pragma unroll
    for (int c = 0; c < TILES; c++) {
      float sum[4] = {};
      const u32 x0[4] = {pieces[c][0].x, pieces[c][0].y, pieces[c][0].z, pieces[c][0].w};
      const u32 x1[4] = {pieces[c][1].x, pieces[c][1].y, pieces[c][1].z, pieces[c][1].w};
#pragma unroll
      for (int q = 0; q < 4; q++) multiply(sum, a[q][0].x, a[q][1].x, a[q][0].y, a[q][1].y, x0[q], x1[q]);
#pragma unroll
      for (int e = 0; e < 4; e++)
        if (rows.mask >> (8 * c + 2 * t + (e & 1)) & 1) atomicAdd(to + (8 * c + (e & 1)) * row_size + 8 * (e >> 1), sum[e]);
    }
  }
  __device__ __forceinline__ void operator()(const u16* x) {
    wait_for_previous();
    while (left) {
      add(x);
      if (--left == 0) return;
      next();
      load();
    }
  }
};

// sums += scale * B (A x), by warp `share` of `shares`: an equal run of all pairs of 16 rows of x and 16
// of the weight. B is operand A of mma; A x is operand B, split in two bfloat16 so that no digit of note
// is lost. A slot is taken once for all rows that have it.
template <int P> struct ExpandBeside {
  static constexpr int SET = P < 16 ? P : 16, TILES = SET / 8, STEPS = 4;  // rows; of 8 rows; of 16 ranks held at a time
  const Expanding& adapters;
  const Matrix& m;
  const int lane, quad, t, parts;
  int slot;                     // of row `lane` of the set
  float scale;
  u32 all;                      // rows that have an adapter, a bit each
  u32 shrunk[STEPS][TILES][4];  // of each row's own slot, ranks 4 t to 4 t + 3: two pairs of high parts, two of low ones
  uint2 low[STEPS], high[STEPS];  // B of the weight's rows `quad` and 8 further
  float added[TILES][4];

  __device__ __forceinline__ ExpandBeside(const Expanding& adapters, const Matrix& m)
      : adapters(adapters), m(m), lane(threadIdx.x & 31), quad(lane >> 2), t(lane & 3),
        parts(count_parts(m)) {}

  __device__ __forceinline__ const u16* find_b(int slot, int row) const {
    return adapters.b + (static_cast<u64>(slot - 1) * m.rows + row) * adapters.held;
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
      const int own = take_slot(slot, remaining);
      for (int at = lane * 64; at < (end - begin) * 16 * adapters.held; at += 32 * 64) prefetch(find_b(own, begin * 16) + at);
    }
  }
  __device__ __forceinline__ void hold_shrunk(int set, int part, int first) {
#pragma unroll
    for (int c = 0; c < TILES; c++) {
      const int own = __shfl_sync(~0u, slot, 8 * c + quad);
      const float factor = __shfl_sync(~0u, scale, 8 * c + quad);
      const float* of_row = adapters.shrunk + static_cast<u64>(set * SET + 8 * c + quad) * adapters.stride;
      const float4* from = reinterpret_cast<const float4*>(of_row + first * parts + part * 16);
#pragma unroll
      for (int s = 0; s < STEPS; s++) {
        float4 x = make_float4(0.f, 0.f, 0.f, 0.f);
        if (own && first + 16 * s < adapters.ranks) x = __ldca(from + 4 * s * parts + t);
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
    high[i] = inside ? __ldg(reinterpret_cast<const uint2*>(at + 8 * adapters.held)) : make_uint2(0, 0);
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
    for (int c = 0; c < TILES; c++) add_tile<4>(to + static_cast<u64>(8 * c) * m.rows, added[c], m.rows, all >> (8 * c));
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

// What a product is told of adapters: A or B, or none.
struct Beside {
  const u16* a;
  float* shrunk;
  const u16* b;
  const int* slots;
  const float* scales;
  int stride, held, ranks;  // held and ranks: of all parts with A

  template <int P>
  __device__ __forceinline__ void add(const Matrix& m, const u8* x, float* sums, int x_rows, int share, int shares) const {
    if (a) ShrinkBeside<P>({a, slots, shrunk, stride, held, ranks}, m.columns, x_rows, share, shares)(reinterpret_cast<const u16*>(x));
    if (b) ExpandBeside<P>({shrunk, b, slots, scales, stride, held, ranks}, m)(sums, x_rows, share, shares);
  }
};
