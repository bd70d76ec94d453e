// What comes between the products of a fused decode step, attention apart: the residual stream and
// SwiGLU. A warp has 8 rows and TILES * 16 columns, as mma leaves what the adapters add (sums.cuh).

#include "sums.cuh"

constexpr int WARPS = 4, ROWS = 8;

template <int TILES> struct Place {
  int lane, first_row, row, first_column, column;  // this lane's are `row` and the next one, `column` and the next
  __device__ __forceinline__ Place()
      : lane(threadIdx.x & 31), first_row(blockIdx.y * ROWS), row(first_row + (lane & 3) * 2),
        first_column((blockIdx.x * WARPS + (threadIdx.x >> 5)) * TILES * 16), column(first_column + (lane >> 2) * 2) {}
};

// Sums of this lane: [tile][row, row + 1][column, column + 1]. Cleared for the next product.
__device__ __forceinline__ float2* find(float* sums, int outputs, int row, int column) {
  return reinterpret_cast<float2*>(sums + static_cast<u64>(row) * outputs + column);
}
template <int TILES>
__device__ __forceinline__ void take(float (&values)[TILES][4], float* sums, int outputs, int rows, int row, int column) {
#pragma unroll
  for (int tile = 0; tile < TILES; tile++)
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const float2* at = find(sums, outputs, row + i, column + 16 * tile);
      const float2 pair = row + i < rows ? __ldcg(at) : make_float2(0.f, 0.f);
      values[tile][2 * i] = pair.x; values[tile][2 * i + 1] = pair.y;
    }
}
template <int TILES>
__device__ __forceinline__ void clear(float* sums, int outputs, int rows, int row, int column) {
#pragma unroll
  for (int tile = 0; tile < TILES; tile++)
#pragma unroll
    for (int i = 0; i < 2; i++)
      if (row + i < rows) *find(sums, outputs, row + i, column + 16 * tile) = make_float2(0.f, 0.f);
}

struct Residual {
  u16* h;             // [M, width]
  const u16* weight;  // [width], of the norm that is put off; null: no x and no squares
  u16* x;             // h * weight, tiled
  float* squares;     // [M], of h, added to
  int rows, width, padded;

  // Two columns of a row; returns their squares' sum.
  __device__ __forceinline__ float leave(u32 pair, int row, int column) const {
    *reinterpret_cast<u32*>(h + static_cast<u64>(row) * width + column) = pair;
    if (weight) {
      const u32 factors = __ldg(reinterpret_cast<const u32*>(weight + column));
      const u32 product = round_pair(low_half(pair) * low_half(factors), high_half(pair) * high_half(factors));
      *reinterpret_cast<u32*>(x + tiled_at(row, column, padded)) = product;
    }
    return low_half(pair) * low_half(pair) + high_half(pair) * high_half(pair);
  }
  // The sum over lanes with one row, those that are a multiple of `step` apart.
  __device__ __forceinline__ void add_squares(float square, int row, int step, bool writes) const {
    if (!weight) return;
    for (int other = step; other < 32; other *= 2) square += __shfl_xor_sync(~0u, square, other);
    if (writes && row < rows) atomicAdd(squares + row, square);
  }
};

// One row a block; a thread has two columns.
__device__ __forceinline__ void begin_residual(const long long* ids, const u16* embedding, const Residual& residual) {
  let_next_start();
  wait_for_previous();
  const int row = blockIdx.y, column = (blockIdx.x * WARPS * 32 + threadIdx.x) * 2;
  float square = 0.f;
  if (column < residual.width) {
    const u16* from = embedding + ids[row] * residual.width + column;
    square = residual.leave(__ldg(reinterpret_cast<const u32*>(from)), row, column);
  }
  residual.add_squares(square, row, 1, (threadIdx.x & 31) == 0);
}

template <int TILES>
__device__ __forceinline__ void add_to_residual(float* sums, const Adapters& adapters, const Residual& residual) {
  let_next_start();
  const Place<TILES> at;
  const int rows = residual.rows, width = residual.width;
  if (at.first_column >= width) return;
  Expansion<1, TILES> expansion(adapters, at.first_row, rows, at.first_column, width);
  wait_for_previous();
  float values[1][TILES][4];
  u32 old[TILES][2];
  take(values[0], sums, width, rows, at.row, at.column);
#pragma unroll
  for (int tile = 0; tile < TILES; tile++)
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const u16* from = residual.h + static_cast<u64>(at.row + i) * width + at.column + 16 * tile;
      old[tile][i] = at.row + i < rows ? __ldcg(reinterpret_cast<const u32*>(from)) : 0;
    }
  expansion.add(values);
  clear<TILES>(sums, width, rows, at.row, at.column);
#pragma unroll
  for (int i = 0; i < 2; i++) {
    float square = 0.f;
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
      if (at.row + i >= rows) continue;
      const u32 added = round_pair(values[0][tile][2 * i], values[0][tile][2 * i + 1]), before = old[tile][i];
      const u32 h = round_pair(low_half(before) + low_half(added), high_half(before) + high_half(added));
      square += residual.leave(h, at.row + i, at.column + 16 * tile);
    }
    residual.add_squares(square, at.row + i, 4, at.lane < 4);
  }
}

__device__ __forceinline__ float silu(float x) { return __fdividef(x, 1.f + __expf(-x)); }

// gate|up times 1 / rms, rounded; silu(gate) * up tiled.
template <int TILES>
__device__ __forceinline__ void silu_mul(float* sums, const Adapters& adapters, const float* squares, u16* x, float share,
                                         float eps, int rows, int padded) {
  let_next_start();
  const Place<TILES> at;
  const int outputs = adapters.outputs, width = outputs / 2;
  if (at.first_column >= width) return;
  Expansion<2, TILES> expansion(adapters, at.first_row, rows, at.first_column, width);
  wait_for_previous();
  float values[2][TILES][4], factors[2] = {};  // gate, up
  take(values[0], sums, outputs, rows, at.row, at.column);
  take(values[1], sums, outputs, rows, at.row, width + at.column);
#pragma unroll
  for (int i = 0; i < 2; i++)
    if (at.row + i < rows) factors[i] = inverse_rms(squares, at.row + i, share, eps);
  expansion.add(values);
  clear<TILES>(sums, outputs, rows, at.row, at.column);
  clear<TILES>(sums, outputs, rows, at.row, width + at.column);
#pragma unroll
  for (int tile = 0; tile < TILES; tile++)
#pragma unroll
    for (int i = 0; i < 2; i++) {
      if (at.row + i >= rows) continue;
      const float *gates = values[0][tile] + 2 * i, *ups = values[1][tile] + 2 * i, factor = factors[i];
      const u32 gate = round_pair(gates[0] * factor, gates[1] * factor);
      const u32 up = round_pair(ups[0] * factor, ups[1] * factor);
      const u32 active = round_pair(silu(low_half(gate)), silu(high_half(gate)));
      const u32 product = round_pair(low_half(active) * low_half(up), high_half(active) * high_half(up));
      *reinterpret_cast<u32*>(x + tiled_at(at.row + i, at.column + 16 * tile, padded)) = product;
    }
}

#define KERNEL extern "C" __global__ void __launch_bounds__(WARPS * 32)

KERNEL begin_residual(const long long* ids, const u16* embedding, const u16* weight, u16* x, u16* residual,
                      float* squares, int rows, int width, int padded) {
  begin_residual(ids, embedding, {residual, weight, x, squares, rows, width, padded});
}

#define INSTANCES(TILES)                                                                                \
  KERNEL add_to_residual_##TILES(float* sums, const float* shrunk, const u16* b, const int* slots,      \
                                 const float* scales, u16* residual, const u16* weight, u16* x,         \
                                 float* squares, int count, int ranks, int outputs, int rows,           \
                                 int padded) {                                                          \
    add_to_residual<TILES>(sums, {shrunk, b, slots, scales, count, ranks, outputs},                     \
                           {residual, weight, x, squares, rows, outputs, padded});                      \
  }                                                                                                     \
  KERNEL silu_mul_##TILES(float* sums, const float* shrunk, const u16* b, const int* slots,             \
                          const float* scales, const float* squares, u16* x, int count, int ranks,      \
                          int outputs, float share, float eps, int rows, int padded) {                  \
    silu_mul<TILES>(sums, {shrunk, b, slots, scales, count, ranks, outputs}, squares, x, share,         \
                    eps, rows, padded);                                                                 \
  }

INSTANCES(1)
INSTANCES(2)
