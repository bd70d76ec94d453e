// What comes between the products of a fused decode step, attention apart: the residual stream and
// SwiGLU. A block has 8 rows, and of columns 16 * TILES a warp; of each 16, a lane has four neighbours, in
// row lane / 4.

#include "sums.cuh"

constexpr int WARPS = 4, ROWS = 8;
// Up to 8 rows of a 7B or 13B model's gate|up are no more blocks than a card like the H100 has processors, and
// 7 warps of 96 registers fit beside a product: then all start while the product runs.
template <int TILES> constexpr int SWIGLU_WARPS = TILES == 1 ? 7 : 4;

// An address is computed before the wait, not where it is used: the compiler would move it there.
template <class T> __device__ __forceinline__ T* hold(T* at) {
  asm volatile("" : "+l"(at));
  return at;
}

template <int TILES, int WARPS = ::WARPS> struct Place {
  int lane, row, column;
  __device__ __forceinline__ Place()
      : lane(threadIdx.x & 31), row(blockIdx.y * ROWS + (lane >> 2)),
        column((blockIdx.x * WARPS + (threadIdx.x >> 5)) * TILES * 16 + (lane & 3) * 4) {}
  // Four neighbours of a row, 16 further for the next tile.
  template <class Four, class T> __device__ __forceinline__ Four* find(T* rows, int width) const {
    return hold(reinterpret_cast<Four*>(rows + static_cast<u64>(row) * width + column));
  }
};

// Where a lane's columns are in a tiled x: two and, 16 bytes away, two.
template <int TILES> struct Tiled {
  u32 *first[TILES], *second[TILES];
  template <int WARPS> __device__ __forceinline__ Tiled(u16* x, const Place<TILES, WARPS>& at, int padded) {
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
      const int index = tiled_at(at.row, at.column + 16 * tile, padded);
      first[tile] = hold(reinterpret_cast<u32*>(x + index));
      second[tile] = hold(reinterpret_cast<u32*>(x + (index ^ 8)));
    }
  }
  __device__ __forceinline__ void store(int tile, const u32 (&pairs)[2]) const {
    *first[tile] = pairs[0];
    *second[tile] = pairs[1];
  }
};

// What the adapters add to the sums of a lane's columns, in each of PARTS parts: scale * B (A x). A x is operand A of
// mma, split in two bfloat16 so that no digit of note is lost, the second ones as rows 8 to 15; B is operand B, 8
// columns at a time, such that a lane's four are its own. A slot is taken once for all rows that have it; HELD
// pieces of B, of 16 ranks, are loaded before any is used: of as many slots, where one piece has all ranks.
template <int TILES, int PARTS, int HELD> struct Expand {
  const Expanding& adapters;
  const int width, column, t, n;
  int mine;                            // slot of this lane's row
  float scale;
  u32 all, left;                       // lanes whose rows have an adapter; whose slots are yet to be taken
  const float* from;                   // A x of this lane's row, from rank 4 t
  int owners[HELD];                    // slots of the pieces, 0 for none
  uint2 words[HELD][PARTS][TILES][2];  // ranks 4 t to 4 t + 3, of columns 2 (n / 2) + n and two further
  float4 shrunk[HELD][PARTS];

  template <int WARPS> __device__ __forceinline__ Expand(const Expanding& adapters, const Place<TILES, WARPS>& at, int rows, int width)
      : adapters(adapters), width(width), column(at.column - (at.lane & 3) * 4), t(at.lane & 3), n(at.lane >> 2), mine(0), scale(0.f) {
    if (adapters.b && at.row < rows) {
      mine = __ldg(adapters.slots + at.row);
      scale = __ldg(adapters.scales + at.row);
    }
    left = all = __ballot_sync(~0u, mine > 0);
    from = adapters.shrunk + static_cast<u64>(at.row) * adapters.stride + max(mine - 1, 0) * PARTS * adapters.ranks + 4 * t;
  }
  __device__ __forceinline__ const u16* find_b(int slot, int part) const {
    return adapters.b + ((static_cast<u64>(slot - 1) * PARTS + part) * width + column) * adapters.ranks;
  }
  // The next pieces, of ranks from `first` on.
  __device__ __forceinline__ void take(int first) {
    const bool alone = adapters.ranks == 16;
    int slot = 0;
#pragma unroll
    for (int i = 0; i < HELD; i++) {
      if (alone || i == 0) slot = take_slot(mine, left);
      const int rank = alone ? 0 : first + 16 * i;
      owners[i] = rank < adapters.ranks ? slot : 0;
#pragma unroll
      for (int part = 0; part < PARTS; part++) {
        const u16* b = find_b(max(slot, 1), part) + (2 * (n & 6) + (n & 1)) * adapters.ranks + rank + 4 * t;
#pragma unroll
        for (int tile = 0; tile < TILES; tile++)
#pragma unroll
          for (int pair = 0; pair < 2; pair++) {
            uint2& word = words[i][part][tile][pair];
            word = make_uint2(0, 0);
            if (owners[i] && column < width)  // not __ldg: the compiler would move it behind the wait
              word = __ldcg(reinterpret_cast<const uint2*>(b + (16 * tile + 2 * pair) * adapters.ranks));
          }
      }
    }
  }
  // B of all slots comes to the L2.
  __device__ __forceinline__ void send_for_b() const {
    const int lane = threadIdx.x & 31;
    for (u32 others = all; others;) {
      const int own = take_slot(mine, others);
#pragma unroll
      for (int part = 0; part < PARTS; part++)
        for (int i = lane * 64; column < width && i < TILES * 16 * adapters.ranks; i += 32 * 64) prefetch(find_b(own, part) + i);
    }
  }
  __device__ __forceinline__ void load_shrunk(int first) {
#pragma unroll
    for (int i = 0; i < HELD; i++)
#pragma unroll
      for (int part = 0; part < PARTS; part++) {
        shrunk[i][part] = make_float4(0.f, 0.f, 0.f, 0.f);
        if (mine && first + 16 * i < adapters.ranks)
          shrunk[i][part] = __ldca(reinterpret_cast<const float4*>(from + part * adapters.ranks + first + 16 * i));
      }
  }
  // Calls `once`, which waits for the product and loads `sums`. No kernel of the step writes B: the first pieces are
  // asked for before that.
  template <class Once> __device__ __forceinline__ void add(float4 (&sums)[PARTS][TILES], Once once) {
    float added[PARTS][TILES][2][4] = {};
#pragma unroll 1
    for (int first = -1, next = 0;;) {
      take(next);
      if (first < 0) {
        send_for_b();
        once();
      }
      if (!all) return;
      if (first != next) load_shrunk(first = next);
#pragma unroll
      for (int i = 0; i < HELD; i++) {
        if (!owners[i]) break;
        const float own = mine == owners[i] ? scale : 0.f;
#pragma unroll
        for (int part = 0; part < PARTS; part++) {
          const float4& ranks = adapters.ranks == 16 ? shrunk[0][part] : shrunk[i][part];
          const float x[4] = {own * ranks.x, own * ranks.y, own * ranks.z, own * ranks.w};
          const u32 high[2] = {round_pair(x[0], x[1]), round_pair(x[2], x[3])};
          const u32 low[2] = {round_pair(x[0] - low_half(high[0]), x[1] - high_half(high[0])),
                              round_pair(x[2] - low_half(high[1]), x[3] - high_half(high[1]))};
#pragma unroll
          for (int tile = 0; tile < TILES; tile++)
#pragma unroll
            for (int pair = 0; pair < 2; pair++) {
              const uint2& word = words[i][part][tile][pair];
              multiply(added[part][tile][pair], high[0], low[0], high[1], low[1], word.x, word.y);
            }
        }
      }
      if (left) continue;
      next += 16 * HELD;
      if (next >= adapters.ranks) break;
      left = all;
    }
#pragma unroll
    for (int part = 0; part < PARTS; part++)
#pragma unroll
      for (int tile = 0; tile < TILES; tile++) {
        const float (&own)[2][4] = added[part][tile];
        sums[part][tile].x += own[0][0] + own[0][2];
        sums[part][tile].y += own[0][1] + own[0][3];
        sums[part][tile].z += own[1][0] + own[1][2];
        sums[part][tile].w += own[1][1] + own[1][3];
      }
  }
};

// A x of a block's rows and columns, for the product that follows: x is operand B of mma, 16 ranks of
// A operand A. A slot is taken once for all rows that have it; warps add up in shared memory.
template <int TILES> struct Shrink {
  static constexpr int GROUPS = TILES == 1 ? 6 : 3, STRIDE = 20;  // of 16 ranks, at a time; of a row's 16 sums: no two lanes share a bank
  const Shrinking& adapters;
  const int lane, column, columns;
  int mine, adding, slot, taken;  // slots: of this lane's row, of the row that it adds up, of `words`, of the sums
  int first, rank;                // ranks: the first of `words`, this thread's first of the sums
  float *of_warp, *of_rank, *to;  // in shared memory a warp's sums and those of a rank; where these are added
  u32 remaining;                  // lanes whose slots are yet to be taken
  uint2 words[GROUPS][TILES][2];  // of the ranks that are next

  // No kernel writes A within a step: this may be before the wait.
  __device__ __forceinline__ Shrink(const Shrinking& adapters, const Place<TILES>& at, int rows, int columns)
      : adapters(adapters), lane(at.lane), column(at.column), columns(columns), mine(0), adding(0), slot(0), first(0) {
    __shared__ Sums sums;
    of_warp = sums.of[0][threadIdx.x >> 5] + (lane & 3) * 2 * STRIDE + (lane >> 2);
    of_rank = sums.of[0][0] + (threadIdx.x >> 4) * STRIDE + (threadIdx.x & 15);
    if (adapters.a) {
      const int other = blockIdx.y * ROWS + (threadIdx.x >> 4);
      if (at.row < rows) mine = __ldg(adapters.slots + at.row);
      if (other < rows) adding = __ldg(adapters.slots + other);
    }
    remaining = __ballot_sync(~0u, mine > 0);
    const u32 all = remaining;
    begin_slot();
    if (!slot) return;
    load();
    for (u32 left = all; left;) {  // what is not held yet comes to the L2
      const int own = take_slot(mine, left);
      const u16* from = adapters.a + static_cast<u64>(own - 1) * adapters.ranks * columns + column - (lane & 3) * 4;
      for (int rank = own == slot ? lane + 16 * GROUPS : lane; rank < adapters.ranks; rank += 32)
        if (column < columns) prefetch(from + static_cast<u64>(rank) * columns);
    }
  }

  __device__ __forceinline__ void load() {
#pragma unroll
    for (int g = 0; g < GROUPS; g++)
#pragma unroll
      for (int tile = 0; tile < TILES; tile++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
          const int rank = first + 16 * g + 8 * half + (lane >> 2);
          words[g][tile][half] = make_uint2(0, 0);
          if (rank < adapters.ranks && column + 16 * tile < columns) {
            const u16* from = adapters.a + (static_cast<u64>(slot - 1) * adapters.ranks + rank) * columns;
            words[g][tile][half] = __ldg(reinterpret_cast<const uint2*>(from + column + 16 * tile));
          }
        }
  }
  __device__ __forceinline__ void begin_slot() {
    first = 0;
    slot = take_slot(mine, remaining);
  }

  // x: pairs of this lane's columns, by tiles. By all threads of a block; calls `once` behind a barrier.
  template <class Once> __device__ __forceinline__ void add(const u32 (&x)[TILES][2], Once once) {
#pragma unroll 1
    for (bool begun = false;; begun = true) {
      multiply_next(x);
      __syncthreads();
      if (!begun) once();
      add_up();
      if (!slot) return;
      __syncthreads();
    }
  }
  // Into shared memory. What comes after it is loaded meanwhile.
  __device__ __forceinline__ void multiply_next(const u32 (&x)[TILES][2]) {
    taken = slot;
    if (!slot) return;
    float products[GROUPS][4] = {};
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
      const bool own = mine == slot;  // what other rows have is not looked at: it may be infinite
      const u32 low = own ? x[tile][0] : 0, high = own ? x[tile][1] : 0;
#pragma unroll
      for (int g = 0; g < GROUPS; g++)
        multiply(products[g], words[g][tile][0].x, words[g][tile][1].x, words[g][tile][0].y, words[g][tile][1].y, low, high);
    }
#pragma unroll
    for (int g = 0; g < GROUPS; g++) {
      if (first + 16 * g >= adapters.ranks) break;
      float* at = of_warp + g * WARPS * ROWS * STRIDE;
      at[0] = products[g][0]; at[STRIDE] = products[g][1]; at[8] = products[g][2]; at[STRIDE + 8] = products[g][3];
    }
    rank = first + (threadIdx.x & 15);
    to = adapters.shrunk + static_cast<u64>(blockIdx.y * ROWS + (threadIdx.x >> 4)) * adapters.stride + (slot - 1) * adapters.ranks + rank;
    first += 16 * GROUPS;
    if (first >= adapters.ranks) begin_slot();
    if (slot) load();
  }
  // A thread has one rank of 16, of one row.
  __device__ __forceinline__ void add_up() const {
    if (!taken || adding != taken) return;
    float sums[GROUPS] = {};
#pragma unroll
    for (int g = 0; g < GROUPS; g++) {
      if (rank + 16 * g >= adapters.ranks) break;
#pragma unroll
      for (int w = 0; w < WARPS; w++) sums[g] += of_rank[(g * WARPS + w) * ROWS * STRIDE];
      atomicAdd(to + 16 * g, sums[g]);
    }
  }
  struct Sums { float of[GROUPS][WARPS][ROWS * STRIDE]; };
};

struct Residual {
  u16* h;             // [M, width]
  const u16* weight;  // [width], of the norm that is put off; null: no x and no squares
  u16* x;             // h * weight, tiled
  float* squares;     // [M], of h, added to
  int rows, width, padded;

  // Of four columns. Not __ldg: the compiler would move it behind the wait.
  __device__ __forceinline__ uint2 find_factors(int column) const {
    return weight && column < width ? __ldcg(reinterpret_cast<const uint2*>(weight + column)) : make_uint2(0, 0);
  }
  // The x of two columns of a row; returns the squares' sum.
  __device__ __forceinline__ float multiply(u32 pair, u32 factors, u32& product) const {
    product = round_pair(low_half(pair) * low_half(factors), high_half(pair) * high_half(factors));
    return low_half(pair) * low_half(pair) + high_half(pair) * high_half(pair);
  }
};

struct Squares { float of[WARPS][ROWS]; };  // of a block's columns, by warps

// h of a lane's columns, as it is to be, and all that follows from it.
template <int TILES>
__device__ __forceinline__ void leave(const Residual& residual, const Place<TILES>& at, uint2* own, const Tiled<TILES>& tiled,
                                      const uint2 (&h)[TILES], const uint2 (&factors)[TILES], Shrink<TILES>& shrink) {
  u32 x[TILES][2] = {};
  float square = 0.f;
#pragma unroll
  for (int tile = 0; tile < TILES; tile++) {
    square += residual.multiply(h[tile].x, factors[tile].x, x[tile][0]);
    square += residual.multiply(h[tile].y, factors[tile].y, x[tile][1]);
  }
#pragma unroll
  for (int tile = 0; tile < TILES; tile++) {
    const int column = at.column + 16 * tile;
    if (at.row >= residual.rows || column >= residual.width) continue;
    if (residual.weight) tiled.store(tile, x[tile]);
    own[4 * tile] = h[tile];
  }
  if (!residual.weight) return;
  square += __shfl_xor_sync(~0u, square, 1);
  square += __shfl_xor_sync(~0u, square, 2);
  __shared__ Squares squares;
  if ((at.lane & 3) == 0) squares.of[threadIdx.x >> 5][at.lane >> 2] = square;
  shrink.add(x, [&] {  // by the last warp: the first ones have the first rows' A x
    const int inner = static_cast<int>(threadIdx.x) - (WARPS * 32 - ROWS), row = blockIdx.y * ROWS + inner;
    if (inner < 0 || row >= residual.rows) return;
    float sum = 0.f;
#pragma unroll
    for (int warp = 0; warp < WARPS; warp++) sum += squares.of[warp][inner];
    atomicAdd(residual.squares + row, sum);
  });
}

template <int TILES>
__device__ __forceinline__ void begin_residual(const long long* ids, const u16* embedding, const Residual& residual,
                                               const Shrinking& adapters) {
  let_next_start();
  const Place<TILES> at;
  Shrink<TILES> shrink(adapters, at, residual.rows, residual.width);
  const Tiled<TILES> tiled(residual.x, at, residual.padded);
  uint2* own = at.template find<uint2>(residual.h, residual.width);
  wait_for_previous();
  uint2 h[TILES] = {}, factors[TILES];
#pragma unroll
  for (int tile = 0; tile < TILES; tile++) {
    const int column = at.column + 16 * tile;
    factors[tile] = residual.find_factors(column);
    if (at.row < residual.rows && column < residual.width)
      h[tile] = __ldg(reinterpret_cast<const uint2*>(embedding + ids[at.row] * residual.width + column));
  }
  leave(residual, at, own, tiled, h, factors, shrink);
}

template <int TILES>
__device__ __forceinline__ void add_to_residual(float* sums, const Residual& residual, const Expanding& expanding,
                                                const Shrinking& shrinking) {
  let_next_start();
  const Place<TILES> at;
  Expand<TILES, 1, TILES == 1 ? 4 : 2> expand(expanding, at, residual.rows, residual.width);
  Shrink<TILES> shrink(shrinking, at, residual.rows, residual.width);
  const Tiled<TILES> tiled(residual.x, at, residual.padded);
  uint2* own = at.template find<uint2>(residual.h, residual.width);
  float4* own_sums = at.template find<float4>(sums, residual.width);
  uint2 factors[TILES], h[TILES] = {};
#pragma unroll
  for (int tile = 0; tile < TILES; tile++) factors[tile] = residual.find_factors(at.column + 16 * tile);
  float4 added[1][TILES] = {};
  expand.add(added, [&] {
    wait_for_previous();
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
      if (at.row >= residual.rows || at.column + 16 * tile >= residual.width) continue;
      added[0][tile] = __ldcg(own_sums + 4 * tile);
      h[tile] = __ldcg(own + 4 * tile);
    }
  });
#pragma unroll
  for (int tile = 0; tile < TILES; tile++) {
    if (at.row >= residual.rows || at.column + 16 * tile >= residual.width) continue;
    own_sums[4 * tile] = make_float4(0.f, 0.f, 0.f, 0.f);
    auto sum = [](u32 old, float low, float high) {
      const u32 added = round_pair(low, high);
      return round_pair(low_half(old) + low_half(added), high_half(old) + high_half(added));
    };
    const float4& four = added[0][tile];
    h[tile] = make_uint2(sum(h[tile].x, four.x, four.y), sum(h[tile].y, four.z, four.w));
  }
  leave(residual, at, own, tiled, h, factors, shrink);
}

__device__ __forceinline__ float silu(float x) { return __fdividef(x, 1.f + __expf(-x)); }

// gate|up times 1 / rms, rounded; silu(gate) * up tiled.
template <int TILES>
__device__ __forceinline__ void silu_mul(float* sums, const float* squares, u16* x, const Expanding& adapters, int width,
                                         float share, float eps, int rows, int padded) {
  let_next_start();
  const Place<TILES, SWIGLU_WARPS<TILES>> at;
  Expand<TILES, 2, 2> expand(adapters, at, rows, width);
  const Tiled<TILES> tiled(x, at, padded);
  float4* own[2] = {at.template find<float4>(sums, 2 * width), at.template find<float4>(sums + width, 2 * width)};
  const float* square = hold(squares + at.row);
  float4 gate_up[2][TILES] = {};
  float squares_of_row = 0.f;
  expand.add(gate_up, [&] {
    wait_for_previous();
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
      if (at.row >= rows || at.column + 16 * tile >= width) continue;
#pragma unroll
      for (int part = 0; part < 2; part++) gate_up[part][tile] = __ldcg(own[part] + 4 * tile);
    }
    if (at.row < rows) squares_of_row = __ldca(square);
  });
  const float factor = inverse_rms(squares_of_row, share, eps);  // not before: A x would be asked for after that
#pragma unroll
  for (int tile = 0; tile < TILES; tile++) {
    if (at.row >= rows || at.column + 16 * tile >= width) continue;
    own[0][4 * tile] = own[1][4 * tile] = make_float4(0.f, 0.f, 0.f, 0.f);
    auto product = [&](float gate0, float gate1, float up0, float up1) {
      const u32 gate = round_pair(gate0 * factor, gate1 * factor), up = round_pair(up0 * factor, up1 * factor);
      const u32 active = round_pair(silu(low_half(gate)), silu(high_half(gate)));
      return round_pair(low_half(active) * low_half(up), high_half(active) * high_half(up));
    };
    const float4 &gate = gate_up[0][tile], &up = gate_up[1][tile];
    tiled.store(tile, {product(gate.x, gate.y, up.x, up.y), product(gate.z, gate.w, up.z, up.w)});
  }
}

#define KERNEL extern "C" __global__ void __launch_bounds__(WARPS * 32, 4)  // of which one fits beside a product of 32 rows

#define INSTANCES(TILES)                                                                                    \
  KERNEL begin_residual_##TILES(const long long* ids, const u16* embedding, const u16* weight, u16* x,      \
                                u16* residual, float* squares, const u16* lora_a, const int* lora_slots,    \
                                float* shrunk, int stride, int ranks, int rows, int width, int padded) {    \
    begin_residual<TILES>(ids, embedding, {residual, weight, x, squares, rows, width, padded},              \
                          {lora_a, lora_slots, shrunk, stride, ranks});                                     \
  }                                                                                                         \
  KERNEL add_to_residual_##TILES(                                                                           \
      float* sums, u16* residual, const u16* weight, u16* x, float* squares, const float* lora_shrunk,      \
      const u16* lora_b, const int* lora_slots, const float* lora_scales, int stride, int ranks,            \
      const u16* lora_a, const int* next_lora_slots, float* shrunk, int next_stride, int next_ranks,        \
      int rows, int width, int padded) {                                                                    \
    add_to_residual<TILES>(sums, {residual, weight, x, squares, rows, width, padded},                       \
                           {lora_shrunk, lora_b, lora_slots, lora_scales, stride, ranks},                   \
                           {lora_a, next_lora_slots, shrunk, next_stride, next_ranks});                     \
  }                                                                                                         \
  extern "C" __global__ void __maxnreg__(TILES == 1 ? 96 : 128)                                             \
  silu_mul_##TILES(float* sums, const float* squares, u16* x, const float* lora_shrunk,                     \
                          const u16* lora_b, const int* lora_slots, const float* lora_scales, int stride,   \
                          int ranks, int width, float share, float eps, int rows, int padded) {             \
    silu_mul<TILES>(sums, squares, x, {lora_shrunk, lora_b, lora_slots, lora_scales, stride, ranks}, width, \
                    share, eps, rows, padded);                                                              \
  }

INSTANCES(1)
INSTANCES(2)
