// Adapters between products: B (A x) into the sums of the one before, and A x for the one that follows.
//
// A warp has 8 rows, and 16 columns or, with two TILES, 32; of each 16, a lane has four neighbours of one row. A and B
// come in pieces, of 16 ranks and the warp's columns, by asynchronous copies into shared memory of the warp's own. No
// kernel of a step writes them: they are asked for before the wait, whatever the rank.
#pragma once

#include "sums.cuh"

constexpr int ROWS = 8, COLUMNS = 16;    // of a warp, of a tile
constexpr int PIECE = 16 * COLUMNS * 2;  // bytes, of each tile and part

// An address is computed before the wait, not where it is used: the compiler would move it there.
template <class T> __device__ __forceinline__ T* hold(T* at) {
  asm volatile("" : "+l"(at));
  return at;
}

// Where a lane is: in row `row`, in columns from `column` on, and 16 further in the next tile. Blocks' edges are at
// multiples of all of a warp's columns: these are inside or not. Warps of a block have the same rows, or, STACKED, the
// same columns.
template <int TILES, int WARPS, bool STACKED = false> struct Place {
  static constexpr int BLOCK_ROWS = STACKED ? WARPS * ROWS : ROWS;
  int lane, warp, row, column;
  __device__ __forceinline__ Place()
      : lane(threadIdx.x & 31), warp(threadIdx.x >> 5),
        row(blockIdx.y * BLOCK_ROWS + (STACKED ? warp * ROWS : 0) + (lane >> 2)),
        column((STACKED ? blockIdx.x : blockIdx.x * WARPS + warp) * COLUMNS * TILES + (lane & 3) * 4) {}
  __device__ __forceinline__ int first_column() const { return column - (lane & 3) * 4; }  // of the warp
  // Four neighbours.
  template <class Four, class T> __device__ __forceinline__ Four* find(T* rows, int width) const {
    return hold(reinterpret_cast<Four*>(rows + static_cast<u64>(row) * width + column));
  }
};

// Pieces of one slot that are used at once, GROUPS at most. The first ranks of all slots come before the next ranks.
// ONE: no row has another slot, and that has GROUPS pieces: there is one turn, and code for no more.
template <int GROUPS, bool ONE> struct Turn {
  u32 all, left;    // lanes whose rows have an adapter; whose slots have yet to come, with these ranks
  int slot, first;  // 0 if no turn is left; its first rank

  __device__ __forceinline__ explicit Turn(int mine) : all(__ballot_sync(~0u, mine > 0)), left(all), first(0) {
    slot = take_slot(mine, left);
  }
  __device__ __forceinline__ void next(int mine, int ranks) {
    slot = ONE ? 0 : take_slot(mine, left);
    if (ONE || slot) return;
    first += 16 * GROUPS;
    if (first >= ranks) return;
    left = all;
    slot = take_slot(mine, left);
  }
  __device__ __forceinline__ int pieces(int ranks) const { return ONE ? GROUPS : min(GROUPS, ranks - first >> 4); }
};

// The pieces of one turn after the other, as many at a time as a warp has room for; or those of the only turn, which
// all warps of a block bring and use, SHARED.
template <bool SHARED> struct Held {
  int room;        // pieces; those of any turn fit
  u8* begin;
  int at, unread;  // the piece that is next, and how many are there from it on

  // From a turn on. all: what there is no room for yet comes to the L2. Source: `copy` and `prefetch`.
  template <class Source, class Turn>
  __device__ __forceinline__ void fetch(const Source& source, int mine, Turn turn, bool all) {
    at = unread = 0;
    const u32 to = static_cast<u32>(__cvta_generic_to_shared(begin));
    bool full = false;
#pragma unroll 1
    for (; turn.slot; turn.next(mine, source.ranks)) {
      const int count = turn.pieces(source.ranks);
      full |= unread + count > room;
      if (full && !all) break;
#pragma unroll 1
      for (int i = 0; i < count; i++) {
        if (full) source.prefetch(turn.slot, turn.first + 16 * i);
        else source.copy(to + unread++ * Source::BYTES, turn.slot, turn.first + 16 * i);
      }
    }
    commit_copies();
  }
  // Before a turn whose pieces may not be there.
  template <class Source, class Turn>
  __device__ __forceinline__ void refill(const Source& source, int mine, const Turn& turn) {
    if (unread >= turn.pieces(source.ranks)) return;
    __syncwarp();  // all have read what was there
    fetch(source, mine, turn, false);
  }
  // The next pieces, 8 bytes of each a lane.
  __device__ __forceinline__ const u8* take(int count, int bytes) {
    wait_for_copies<0>();
    if (SHARED) __syncthreads();
    else __syncwarp();
    const u8* own = begin + at * bytes + (threadIdx.x & 31) * 8;
    at += count;
    unread -= count;
    return own;
  }
};

// B of a warp's columns in all parts. Of each tile, columns lie as the lanes have them, rank by rank. SHARED: of as many
// tiles as there are warps, each brings its own.
template <int TILES, int PARTS, bool SHARED> struct SourceB {
  static constexpr int BYTES = TILES * PARTS * PIECE;
  const u16* from;  // of this lane's column and half of 16 ranks
  int width, held, ranks, place;

  __device__ __forceinline__ SourceB(const Expanding& adapters, int width, int first_column)
      : width(width), held(adapters.held), ranks(adapters.ranks) {
    const int lane = threadIdx.x & 31, column = lane >> 1, half = lane & 1;
    from = adapters.b + static_cast<u64>(first_column + column) * held + 8 * half;
    place = (column >> 1 & 1) * 256 + ((column >> 2) * 2 + (column & 1)) * 32 + half * 16;
  }
  template <class Take> __device__ __forceinline__ void each(int slot, int rank, Take take) const {
#pragma unroll
    for (int part = 0; part < PARTS; part++)
#pragma unroll
      for (int tile = 0; tile < TILES; tile++)
        take(part * TILES + tile,
             from + ((static_cast<u64>(slot - 1) * PARTS + part) * width + tile * COLUMNS) * held + rank);
  }
  __device__ __forceinline__ void copy(u32 to, int slot, int rank) const {
    const int warp = threadIdx.x >> 5;
    each(slot, rank, [&](int i, const u16* at) {
      if (!SHARED || i == warp) ::copy<16>(to + i * PIECE + place, at);
    });
  }
  __device__ __forceinline__ void prefetch(int slot, int rank) const {
    each(slot, rank, [](int, const u16* at) { ::prefetch(at); });
  }
};

// A of a warp's columns, zeros past the last one. Of each tile, it is a matrix [ranks, columns].
template <int TILES> struct SourceA {
  static constexpr int BYTES = TILES * PIECE;
  const u16* from;  // of this lane's rank of 16 and half of the columns
  int columns, held, ranks;
  bool inside;

  __device__ __forceinline__ SourceA(const Shrinking& adapters, int columns, int first_column)
      : columns(columns), held(adapters.held), ranks(adapters.ranks), inside(first_column < columns) {
    const int lane = threadIdx.x & 31;
    from = adapters.a + static_cast<u64>(lane >> 1) * columns + (inside ? first_column : 0) + 8 * (lane & 1);
  }
  __device__ __forceinline__ const u16* find(int slot, int rank) const {
    return from + (static_cast<u64>(slot - 1) * held + rank) * columns;
  }
  __device__ __forceinline__ void copy(u32 to, int slot, int rank) const {
#pragma unroll
    for (int tile = 0; tile < TILES; tile++)
      ::copy<16>(to + tile * PIECE + (threadIdx.x & 31) * 16, find(slot, rank) + tile * COLUMNS, inside);
  }
  __device__ __forceinline__ void prefetch(int slot, int rank) const { ::prefetch(find(slot, rank)); }
};

// What the adapters add to the sums of a lane's columns, in each of PARTS parts: scale * B (A x). A x is operand A of
// mma, split in two bfloat16 so that no digit of note is lost, the second ones as rows 8 to 15; B is operand B, 8
// columns at a time, such that a lane's four are its own. GROUPS: pieces held in registers. STACKED: as in `Place`.
template <int TILES, int PARTS, int GROUPS, bool ONE, bool STACKED = false> struct Expand {
  const Expanding& adapters;
  const int mine;  // slot of this lane's row
  const SourceB<TILES, PARTS, STACKED> source;
  Turn<GROUPS, ONE> turn;
  Held<STACKED> held;
  float scale;
  const float* from;                     // A x of this lane's row, from rank 4 t
  uint2 words[GROUPS][PARTS][TILES][2];  // B of the turn
  u32 shrunk[GROUPS][PARTS][2][2];       // ranks 4 t to 4 t + 3, their high parts and their low ones

  // room: pieces, from `begin` on in shared memory
  template <int WARPS>
  __device__ __forceinline__ Expand(const Expanding& adapters, const Place<TILES, WARPS, STACKED>& at, int rows,
                                    int width, u8* begin, int room)
      : adapters(adapters), mine(find_slot(at.row, rows, at.column < width)), source(adapters, width, at.first_column()),
        turn(STACKED ? find_slot(blockIdx.y * at.BLOCK_ROWS + at.lane, rows, true) : mine), held{room, begin} {
    static_assert(!STACKED || (ONE && WARPS * ROWS == 32 && TILES * PARTS == WARPS), "a lane for each row");
    held.fetch(source, mine, turn, true);
    scale = mine ? __ldg(adapters.scales + at.row) : 0.f;
    from = hold(adapters.shrunk + static_cast<u64>(at.row) * adapters.stride + 4 * (at.lane & 3));
  }
  __device__ __forceinline__ int find_slot(int row, int rows, bool inside) const {
    return adapters.b && row < rows && inside ? __ldg(adapters.slots + row) : 0;
  }
  __device__ __forceinline__ void read() {
    const int count = turn.pieces(adapters.ranks);
    const u8* pieces = held.take(count, source.BYTES);
#pragma unroll
    for (int g = 0; g < GROUPS; g++)
#pragma unroll
      for (int part = 0; part < PARTS; part++)
#pragma unroll
        for (int i = 0; i < 2 * TILES; i++)
          if (g < count)
            words[g][part][i >> 1][i & 1] =
                *reinterpret_cast<const uint2*>(pieces + ((g * PARTS + part) * 2 * TILES + i) * (PIECE / 2));
  }
  // A x of the turn's ranks, of this lane's row.
  __device__ __forceinline__ void ask(float4 (&x)[GROUPS][PARTS]) const {
#pragma unroll
    for (int g = 0; g < GROUPS; g++)
#pragma unroll
      for (int part = 0; part < PARTS; part++) {
        x[g][part] = make_float4(0.f, 0.f, 0.f, 0.f);
        if (mine && (ONE || turn.first + 16 * g < adapters.ranks))
          x[g][part] = __ldca(reinterpret_cast<const float4*>(from + (turn.first + 16 * g) * PARTS + 16 * part));
      }
  }
  __device__ __forceinline__ void split(const float4 (&x)[GROUPS][PARTS]) {
#pragma unroll
    for (int g = 0; g < GROUPS; g++) {
      if (!ONE && turn.first + 16 * g >= adapters.ranks) break;
#pragma unroll
      for (int part = 0; part < PARTS; part++) {
        const float4& four = x[g][part];
        const float own[2][2] = {{scale * four.x, scale * four.y}, {scale * four.z, scale * four.w}};
#pragma unroll
        for (int i = 0; i < 2; i++) {
          u32(&pairs)[2] = shrunk[g][part][i];
          split_pair(own[i][0], own[i][1], pairs[0], pairs[1]);
        }
      }
    }
  }
  // The turn's, added to a lane's four columns, of the low parts to `low`.
  __device__ __forceinline__ void multiply_turn(float4 (&sums)[PARTS][TILES], float4 (&low)[PARTS][TILES]) {
    const int count = turn.pieces(adapters.ranks);
    const u32 mask = mine == turn.slot ? ~0u : 0;  // what other rows have is not looked at: it may be infinite
#pragma unroll
    for (int g = 0; g < GROUPS; g++) {
      if (g == count) break;
#pragma unroll
      for (int part = 0; part < PARTS; part++) {
        const u32(&x)[2][2] = shrunk[g][part];
        const u32 own[4] = {x[0][0] & mask, x[0][1] & mask, x[1][0] & mask, x[1][1] & mask};
#pragma unroll
        for (int tile = 0; tile < TILES; tile++) {
          float4 &four = sums[part][tile], &lows = low[part][tile];
          const uint2(&b)[2] = words[g][part][tile];
          float first[4] = {four.x, four.y, lows.x, lows.y}, second[4] = {four.z, four.w, lows.z, lows.w};
          multiply(first, own[0], own[1], own[2], own[3], b[0].x, b[0].y);
          multiply(second, own[0], own[1], own[2], own[3], b[1].x, b[1].y);
          four = make_float4(first[0], first[1], second[0], second[1]);
          lows = make_float4(first[2], first[3], second[2], second[3]);
        }
      }
    }
  }
  // Waits for the product and calls `once`, which loads `sums`.
  template <class Once> __device__ __forceinline__ void add(float4 (&sums)[PARTS][TILES], Once once) {
    constexpr bool EARLY = TILES == 1;  // of few rows a block has waited for B by then
    if (EARLY && turn.slot) read();
    wait_for_previous();
    float4 x[GROUPS][PARTS];
    ask(x);  // first: more comes after it
    once();
    if (!turn.slot) return;
    if (!EARLY) read();
    split(x);
    float4 low[PARTS][TILES] = {};
#pragma unroll 1
    for (int known = 0;;) {
      multiply_turn(sums, low);
      turn.next(mine, adapters.ranks);
      if (!turn.slot) break;
      held.refill(source, mine, turn);
      read();
      if (turn.first == known) continue;
      known = turn.first;
      ask(x);
      split(x);
    }
#pragma unroll
    for (int part = 0; part < PARTS; part++)
#pragma unroll
      for (int tile = 0; tile < TILES; tile++) {
        sums[part][tile].x += low[part][tile].x;
        sums[part][tile].y += low[part][tile].y;
        sums[part][tile].z += low[part][tile].z;
        sums[part][tile].w += low[part][tile].w;
      }
  }
};

// A x of a block's rows and columns, for the product that follows: x is operand A of mma, 8 ranks of A operand B. Warps
// add up in shared memory. PIECES: of the rows' only adapter, in each of q|k|v; 0: of any adapters.
template <int TILES, int PIECES> struct Shrink {
  // Pieces between two barriers, pieces held in registers.
  static constexpr int WARPS = 4, GROUPS = PIECES ? 3 * PIECES : TILES == 1 ? 8 : 6, BATCH = 3;
  static constexpr bool ONE = PIECES != 0;
  struct Sums { float of[GROUPS][WARPS][ROWS * 16]; };
  const Shrinking& adapters;
  const int mine;  // slot of this lane's row
  const SourceA<TILES> source;
  Turn<GROUPS, ONE> turn;
  Held<false> held;
  const u8* pieces;              // of the turn
  uint2 words[BATCH][TILES][2];  // of some of these
  float *of_warp, *of_all;       // in shared memory a warp's sums, and all warps' of four ranks
  float* to;                     // where these are added

  __device__ __forceinline__ Shrink(const Shrinking& adapters, const Place<TILES, WARPS>& at, int rows, int columns,
                                    u8* begin, int room)
      : adapters(adapters), mine(adapters.a && at.row < rows ? __ldg(adapters.slots + at.row) : 0),
        source(adapters, columns, at.first_column()), turn(mine), held{room, begin} {
    held.fetch(source, mine, turn, true);
    __shared__ Sums sums;
    of_warp = sums.of[0][at.warp] + (at.lane >> 2) * 16 + (at.lane & 3) * 2;
    of_all = sums.of[at.warp][0] + at.lane * 4;
    to = hold(adapters.shrunk + static_cast<u64>(at.row) * adapters.stride + 16 * at.warp + (at.lane & 3) * 4);
  }
  // A of the first turn.
  __device__ __forceinline__ void begin() {
    if (turn.slot) take();
  }
  __device__ __forceinline__ void take() {
    pieces = held.take(turn.pieces(adapters.ranks), source.BYTES);
    read(0);
  }
  __device__ __forceinline__ void read(int first) {
#pragma unroll
    for (int g = 0; g < BATCH; g++)
#pragma unroll
      for (int i = 0; i < 2 * TILES; i++) {
        const u8* at = pieces + ((first + g) * 2 * TILES + i) * (PIECE / 2);
        if (first + g < turn.pieces(adapters.ranks)) words[g][i >> 1][i & 1] = *reinterpret_cast<const uint2*>(at);
      }
  }

  // x: pairs of this lane's columns. By all threads of a block; calls `once` behind a barrier.
  template <class Once> __device__ __forceinline__ void add(const u32 (&x)[TILES][2], Once once) {
    if (turn.slot) multiply_turn(x);
    __syncthreads();
    once();
#pragma unroll 1
    while (turn.slot) {
      add_up();
      turn.next(mine, adapters.ranks);
      if (!turn.slot) return;
      held.refill(source, mine, turn);
      take();
      __syncthreads();
      multiply_turn(x);
      __syncthreads();
    }
  }
  // Into shared memory.
  __device__ __forceinline__ void multiply_turn(const u32 (&x)[TILES][2]) {
    const int count = turn.pieces(adapters.ranks);
    const u32 mask = mine == turn.slot ? ~0u : 0;
#pragma unroll 1
    for (int first = 0;;) {
#pragma unroll
      for (int g = 0; g < BATCH; g++) {
        if (first + g >= count) break;
#pragma unroll
        for (int half = 0; half < 2; half++) {
          float product[4] = {};
#pragma unroll
          for (int tile = 0; tile < TILES; tile++) {
            const uint2& a = words[g][tile][half];
            multiply(product, x[tile][0] & mask, 0, x[tile][1] & mask, 0, a.x, a.y);
          }
          float* at = of_warp + (first + g) * WARPS * ROWS * 16 + 8 * half;
          *reinterpret_cast<float2*>(at) = make_float2(product[0], product[1]);
        }
      }
      first += BATCH;
      if (first >= count) return;
      read(first);
    }
  }
  // A lane has four ranks of its row, of every fourth group.
  __device__ __forceinline__ void add_up() const {
    const int count = turn.pieces(adapters.ranks) - static_cast<int>(threadIdx.x >> 5);
    if (mine != turn.slot) return;
#pragma unroll
    for (int g = 0; g < GROUPS; g += WARPS) {
      if (g >= count) return;
      float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
      for (int w = 0; w < WARPS; w++) {
        const float4 own = *reinterpret_cast<const float4*>(of_all + (g * WARPS + w) * ROWS * 16);
        sum.x += own.x; sum.y += own.y; sum.z += own.z; sum.w += own.w;
      }
      add_four(to + turn.first + 16 * g, sum);
    }
  }
};
