// What comes between the products of a fused decode step, attention apart: the residual stream and
// SwiGLU. A block has 8 rows and WARPS * TILES * 16 columns; of each 16 that a warp has, a lane has
// four neighbours, in row lane / 4.

#include "sums.cuh"

constexpr int WARPS = 4, ROWS = 8;

template <int TILES> struct Place {
  int lane, row, column;
  __device__ __forceinline__ Place()
      : lane(threadIdx.x & 31), row(blockIdx.y * ROWS + (lane >> 2)),
        column((blockIdx.x * WARPS + (threadIdx.x >> 5)) * TILES * 16 + (lane & 3) * 4) {}
};

// Four neighbours of a row of sums. Cleared for the next product.
__device__ __forceinline__ float4* find(float* sums, int outputs, int row, int column) {
  return reinterpret_cast<float4*>(sums + static_cast<u64>(row) * outputs + column);
}

// A x of a block's rows and columns, for the product that follows: x is operand B of mma, 16 ranks of
// A operand A. A slot is taken once for all rows that have it; warps add up in shared memory.
template <int TILES> struct Shrink {
  static constexpr int GROUPS = 3, STRIDE = 20;  // of 16 ranks, at a time; of a row's 16 sums: no two lanes share a bank
  const Adapters& adapters;
  const int lane, column, columns;
  int mine, adding, slot;           // slots: of this lane's row, of the row that it adds up, of `words`
  u32 remaining;                    // lanes whose slots are yet to be taken
  uint2 words[GROUPS][TILES][2];    // of the ranks that are next

  // No kernel writes A within a step: this may be before the wait.
  __device__ __forceinline__ Shrink(const Adapters& adapters, const Place<TILES>& at, int rows, int columns)
      : adapters(adapters), lane(at.lane), column(at.column), columns(columns), mine(0), adding(0), slot(0) {
    if (adapters.a) {
      const int other = blockIdx.y * ROWS + (threadIdx.x >> 4);
      if (at.row < rows) mine = __ldg(adapters.slots + at.row);
      if (other < rows) adding = __ldg(adapters.slots + other);
    }
    remaining = __ballot_sync(~0u, mine > 0);
    if (!remaining) return;
    const u32 all = remaining;
    next_slot();
    for (u32 left = all; left;) {  // what is not held yet comes to the L2
      const int own = __shfl_sync(~0u, mine, __ffs(left) - 1);
      left &= ~__ballot_sync(~0u, mine == own);
      const u16* from = adapters.a + static_cast<u64>(own - 1) * adapters.ranks * columns + column - (lane & 3) * 4;
      for (int rank = own == slot ? lane + 16 * GROUPS : lane; rank < adapters.ranks; rank += 32)
        if (column < columns) prefetch(from + static_cast<u64>(rank) * columns);
    }
  }

  __device__ __forceinline__ void load(int first) {
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
  __device__ __forceinline__ void next_slot() {
    slot = __shfl_sync(~0u, mine, __ffs(remaining) - 1);
    remaining &= ~__ballot_sync(~0u, mine == slot);
    load(0);
  }

  // x: pairs of this lane's columns, by tiles. By all threads of a block.
  __device__ __forceinline__ void add(const u32 (&x)[TILES][2]) {
    __shared__ Sums shared_sums;
    bool used = false;
    for (int first = 0; slot;) {
      float sums[GROUPS][4] = {};
#pragma unroll
      for (int tile = 0; tile < TILES; tile++) {
        const bool own = mine == slot;  // what other rows have is not looked at: it may be infinite
        const u32 low = own ? x[tile][0] : 0, high = own ? x[tile][1] : 0;
#pragma unroll
        for (int g = 0; g < GROUPS; g++)
          multiply(sums[g], words[g][tile][0].x, words[g][tile][1].x, words[g][tile][0].y, words[g][tile][1].y, low, high);
      }
      const int taken = slot, rank = first + (threadIdx.x & 15), row = threadIdx.x >> 4;
      first += 16 * GROUPS;  // what comes next is loaded while these are put together
      if (first < adapters.ranks) {
        load(first);
      } else {
        first = slot = 0;
        if (remaining) next_slot();
      }
      if (used) __syncthreads();
      used = true;
#pragma unroll
      for (int g = 0; g < GROUPS; g++) {
        float* at = shared_sums.of[g][threadIdx.x >> 5] + (lane & 3) * 2 * STRIDE + (lane >> 2);
        at[0] = sums[g][0]; at[STRIDE] = sums[g][1]; at[8] = sums[g][2]; at[STRIDE + 8] = sums[g][3];
      }
      __syncthreads();
      if (adding == taken) {
        float* to = adapters.shrunk + (static_cast<u64>(blockIdx.y * ROWS + row) * adapters.count + taken - 1) * adapters.ranks;
#pragma unroll
        for (int g = 0; g < GROUPS; g++) {
          float sum = 0.f;
#pragma unroll
          for (int w = 0; w < WARPS; w++) sum += shared_sums.of[g][w][row * STRIDE + (threadIdx.x & 15)];
          if (rank + 16 * g < adapters.ranks) atomicAdd(to + rank + 16 * g, sum);
        }
      }
      __syncwarp();
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
  // Two columns of a row and the x of them; returns the squares' sum.
  __device__ __forceinline__ float leave(u32 pair, u32 factors, int row, int column, u32& product) const {
    product = round_pair(low_half(pair) * low_half(factors), high_half(pair) * high_half(factors));
    if (weight) *reinterpret_cast<u32*>(x + tiled_at(row, column, padded)) = product;
    return low_half(pair) * low_half(pair) + high_half(pair) * high_half(pair);
  }
  __device__ __forceinline__ uint2* find(int row, int column) const {
    return reinterpret_cast<uint2*>(h + static_cast<u64>(row) * width + column);
  }
};

struct Squares { float of[WARPS][ROWS]; };  // of a block's columns, by warps

// h of a lane's columns, as it is to be, and all that follows from it.
template <int TILES>
__device__ __forceinline__ void leave(const Residual& residual, const Place<TILES>& at, const uint2 (&h)[TILES],
                                      const uint2 (&factors)[TILES], Shrink<TILES>& shrink) {
  u32 x[TILES][2] = {};
  float square = 0.f;
#pragma unroll
  for (int tile = 0; tile < TILES; tile++) {
    const int column = at.column + 16 * tile;
    if (at.row >= residual.rows || column >= residual.width) continue;
    *residual.find(at.row, column) = h[tile];
    square += residual.leave(h[tile].x, factors[tile].x, at.row, column, x[tile][0]);
    square += residual.leave(h[tile].y, factors[tile].y, at.row, column + 2, x[tile][1]);
  }
  if (!residual.weight) return;
  square += __shfl_xor_sync(~0u, square, 1);
  square += __shfl_xor_sync(~0u, square, 2);
  __shared__ Squares squares;
  if ((at.lane & 3) == 0) squares.of[threadIdx.x >> 5][at.lane >> 2] = square;
  __syncthreads();
  const int row = blockIdx.y * ROWS + threadIdx.x;
  if (threadIdx.x < ROWS && row < residual.rows) {
    float sum = 0.f;
#pragma unroll
    for (int warp = 0; warp < WARPS; warp++) sum += squares.of[warp][threadIdx.x];
    atomicAdd(residual.squares + row, sum);
  }
  shrink.add(x);
}

template <int TILES>
__device__ __forceinline__ void begin_residual(const long long* ids, const u16* embedding, const Residual& residual,
                                               const Adapters& adapters) {
  let_next_start();
  const Place<TILES> at;
  Shrink<TILES> shrink(adapters, at, residual.rows, residual.width);
  wait_for_previous();
  uint2 h[TILES] = {}, factors[TILES];
#pragma unroll
  for (int tile = 0; tile < TILES; tile++) {
    const int column = at.column + 16 * tile;
    factors[tile] = residual.find_factors(column);
    if (at.row < residual.rows && column < residual.width)
      h[tile] = __ldg(reinterpret_cast<const uint2*>(embedding + ids[at.row] * residual.width + column));
  }
  leave(residual, at, h, factors, shrink);
}

template <int TILES>
__device__ __forceinline__ void add_to_residual(float* sums, const Residual& residual, const Adapters& adapters) {
  let_next_start();
  const Place<TILES> at;
  Shrink<TILES> shrink(adapters, at, residual.rows, residual.width);
  uint2 factors[TILES], h[TILES] = {};
#pragma unroll
  for (int tile = 0; tile < TILES; tile++) factors[tile] = residual.find_factors(at.column + 16 * tile);
  wait_for_previous();
  float4 added[TILES];
#pragma unroll
  for (int tile = 0; tile < TILES; tile++) {
    const int column = at.column + 16 * tile;
    if (at.row >= residual.rows || column >= residual.width) continue;
    added[tile] = __ldcg(find(sums, residual.width, at.row, column));
    h[tile] = __ldcg(residual.find(at.row, column));
  }
#pragma unroll
  for (int tile = 0; tile < TILES; tile++) {
    const int column = at.column + 16 * tile;
    if (at.row >= residual.rows || column >= residual.width) continue;
    *find(sums, residual.width, at.row, column) = make_float4(0.f, 0.f, 0.f, 0.f);
    auto sum = [](u32 old, float low, float high) {
      const u32 added = round_pair(low, high);
      return round_pair(low_half(old) + low_half(added), high_half(old) + high_half(added));
    };
    h[tile] = make_uint2(sum(h[tile].x, added[tile].x, added[tile].y), sum(h[tile].y, added[tile].z, added[tile].w));
  }
  leave(residual, at, h, factors, shrink);
}

__device__ __forceinline__ float silu(float x) { return __fdividef(x, 1.f + __expf(-x)); }

// gate|up times 1 / rms, rounded; silu(gate) * up tiled.
template <int TILES>
__device__ __forceinline__ void silu_mul(float* sums, const float* squares, u16* x, const Adapters& adapters, int width,
                                         float share, float eps, int rows, int padded) {
  let_next_start();
  const Place<TILES> at;
  Shrink<TILES> shrink(adapters, at, rows, width);
  wait_for_previous();
  float4 gates[TILES], ups[TILES];
  u32 products[TILES][2] = {};
#pragma unroll
  for (int tile = 0; tile < TILES; tile++) {
    const int column = at.column + 16 * tile;
    if (at.row >= rows || column >= width) continue;
    gates[tile] = __ldcg(find(sums, 2 * width, at.row, column));
    ups[tile] = __ldcg(find(sums, 2 * width, at.row, width + column));
  }
  const float factor = at.row < rows ? inverse_rms(squares, at.row, share, eps) : 0.f;
#pragma unroll
  for (int tile = 0; tile < TILES; tile++) {
    const int column = at.column + 16 * tile;
    if (at.row >= rows || column >= width) continue;
    *find(sums, 2 * width, at.row, column) = *find(sums, 2 * width, at.row, width + column) = make_float4(0.f, 0.f, 0.f, 0.f);
    auto product = [&](float gate0, float gate1, float up0, float up1) {
      const u32 gate = round_pair(gate0 * factor, gate1 * factor), up = round_pair(up0 * factor, up1 * factor);
      const u32 active = round_pair(silu(low_half(gate)), silu(high_half(gate)));
      return round_pair(low_half(active) * low_half(up), high_half(active) * high_half(up));
    };
    const float4 &gate = gates[tile], &up = ups[tile];
    products[tile][0] = product(gate.x, gate.y, up.x, up.y);
    products[tile][1] = product(gate.z, gate.w, up.z, up.w);
#pragma unroll
    for (int i = 0; i < 2; i++)
      *reinterpret_cast<u32*>(x + tiled_at(at.row, column + 2 * i, padded)) = products[tile][i];
  }
  shrink.add(products);
}

#define KERNEL extern "C" __global__ void __launch_bounds__(WARPS * 32)

#define INSTANCES(TILES)                                                                                \
  KERNEL begin_residual_##TILES(const long long* ids, const u16* embedding, const u16* weight, u16* x,  \
                                u16* residual, float* squares, const u16* lora_a,                       \
                                const int* lora_slots, float* shrunk, int count, int ranks, int rows,   \
                                int width, int padded) {                                                \
    begin_residual<TILES>(ids, embedding, {residual, weight, x, squares, rows, width, padded},          \
                          {lora_a, lora_slots, shrunk, count, ranks});                                  \
  }                                                                                                     \
  KERNEL add_to_residual_##TILES(float* sums, u16* residual, const u16* weight, u16* x, float* squares, \
                                 const u16* lora_a, const int* lora_slots, float* shrunk, int count,    \
                                 int ranks, int rows, int width, int padded) {                          \
    add_to_residual<TILES>(sums, {residual, weight, x, squares, rows, width, padded},                   \
                           {lora_a, lora_slots, shrunk, count, ranks});                                 \
  }                                                                                                     \
  KERNEL silu_mul_##TILES(float* sums, const float* squares, u16* x, const u16* lora_a,                 \
                          const int* lora_slots, float* shrunk, int count, int ranks, int width,        \
                          float share, float eps, int rows, int padded) {                               \
    silu_mul<TILES>(sums, squares, x, {lora_a, lora_slots, shrunk, count, ranks}, width, share, eps,    \
                    rows, padded);                                                                      \
  }

INSTANCES(1)
INSTANCES(2)
